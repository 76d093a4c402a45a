"""Records of the files that pass between stages: each is written and read by the same class."""
