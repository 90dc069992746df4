"""Many runs of one file: which keys are tried, where trials run, what comes out."""
