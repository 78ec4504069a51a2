"""Code that a directory of the layout "owl1" carries; modules of version 2 are links."""
