"""A run's encoder as a file that others load without tracekin."""

SUFFIXES = {"torchvision": ".pth", "timm": ".safetensors", "safetensors": ".safetensors"}
SUFFIXES |= {"torchscript": ".pt", "onnx": ".onnx"}
"""The formats, and what their files end in."""
