"""Loading of a rank's weights; see docs/architecture.md.

`checkpoint` finds the tensors in the files, `parameters` says which a rank needs and where they go, `quantization` knows the
published formats, `reader` copies bytes with several threads, `weights` puts these together, `inspection` describes a checkpoint.
"""
