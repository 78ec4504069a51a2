"""Input formats of tools/preprocess_data.py: one module for each, found by `registry`.

A new format is one new file here, with a class that implements `format.Format` and a tuple
`FORMATS` of its instances. What readers share is in `common`.
"""
