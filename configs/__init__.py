if __name__ != "diffdistill.configs":
    raise ImportError("import this folder as diffdistill.configs, not as configs")
