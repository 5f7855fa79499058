"""Small generated data sets in the exact formats of the benchmarks: invented content, awkward cases included."""
