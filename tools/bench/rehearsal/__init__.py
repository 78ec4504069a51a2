"""Rehearsal of data loading at full scale, in simulated time; see tools/bench/rehearsal.py."""
