"""The family of preconditioned optimizers: SGD, Adam, Gauss-Newton's diagonal, ESGD, AdaHessian, Shampoo, K-FAC; and torch's L-BFGS behind the same step."""
from .adahessian import AdaHessian
from .base import SGD, Adam, PreconditionedSGD
from .esgd import ESGD
from .gauss_newton import GaussNewton
from .kfac import KFAC
from .lbfgs import LBFGS
from .shampoo import Shampoo

__all__ = ["ESGD", "KFAC", "LBFGS", "SGD", "AdaHessian", "Adam", "GaussNewton", "PreconditionedSGD", "Shampoo"]
