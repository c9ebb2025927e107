"""Quantizers, quantized layers and the conversion of a network."""

from bitwright.quant.convert import QuantOptions, quantize, verify_widths
from bitwright.quant.functional import fake_quantize
from bitwright.quant.functional_calls import ProductCall, WeightCall, named_quant_calls
from bitwright.quant.modules import QuantLayer, named_quant_layers
from bitwright.quant.quantizers import Codes

__all__ = [
    "Codes",
    "ProductCall",
    "QuantLayer",
    "QuantOptions",
    "WeightCall",
    "fake_quantize",
    "named_quant_calls",
    "named_quant_layers",
    "quantize",
    "verify_widths",
]
