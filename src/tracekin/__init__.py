"""tracekin: BYOL (and siblings) pretraining for medical images, with positives mined by influence across devices."""

__version__ = "0.1.0"
