"""The family of preconditioned optimizers: SGD, Adam, ESGD, AdaHessian."""
from .adahessian import AdaHessian
from .base import SGD, Adam, PreconditionedSGD
from .esgd import ESGD

__all__ = ["SGD", "Adam", "ESGD", "AdaHessian", "PreconditionedSGD"]
