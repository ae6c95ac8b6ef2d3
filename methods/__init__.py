if __name__ != "diffdistill.methods":
    raise ImportError("import this folder as diffdistill.methods, not as methods")
