"""Code that a directory of the layout "owl2" carries."""
