if __name__ != "diffdistill.pipelines":
    raise ImportError("import this folder as diffdistill.pipelines, not as pipelines")
