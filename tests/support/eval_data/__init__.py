"""Small data sets in the benchmarks' exact formats, with invented content: one module a benchmark."""
