"""One file per corpus: reads the published files and yields records, or renders one."""
