"""Evaluation of defences on data sets, curves of one picture, self-check and benchmark."""

from tapt.evaluation.run import Results, evaluate
from tapt.evaluation.store import check_record, record

__all__ = ["Results", "check_record", "evaluate", "record"]
