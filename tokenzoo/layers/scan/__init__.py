"""The selective scan: forms, kernels, backends."""
