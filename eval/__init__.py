if __name__ != "diffdistill.eval":
    raise ImportError("import this folder as diffdistill.eval, not as eval")
