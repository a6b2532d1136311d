"""Adapters: small modules that are trained in place of a model's weights."""

from .tensor_train import TensorTrainAdapter, TensorTrainLinear, factorise

__all__ = ["TensorTrainAdapter", "TensorTrainLinear", "factorise"]
