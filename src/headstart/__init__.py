"""headstart: begin pretraining from the best sub-network of a pretrained language model."""

__version__ = "0.1.0"
