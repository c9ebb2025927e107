"""The report of a run: one HTML file that stands alone, made from the run's files and computing nothing anew."""

from bitwright.report.page import render
from bitwright.report.table import policy_rows

__all__ = ["policy_rows", "render"]
