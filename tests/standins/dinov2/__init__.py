"""A stand-in for the package of facebookresearch/dinov2 under the names of its public interface: test_dinov2_hub.py."""
