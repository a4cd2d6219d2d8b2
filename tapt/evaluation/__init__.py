"""Evaluation of defences on data sets, curves of one picture, self-check and benchmark."""

from tapt.evaluation.record import check_record, record
from tapt.evaluation.run import Results, evaluate

__all__ = ["Results", "check_record", "evaluate", "record"]
