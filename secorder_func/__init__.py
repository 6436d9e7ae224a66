"""Second-order curvature for PyTorch as composable functional transforms."""
__version__ = "0.1.0"
