"""The project's records: `baselines.jsonl` and `training_log.jsonl`, read, written and queried."""

from kimi_recursive.records.kinds import BASELINES, TRAINING_LOG
from kimi_recursive.records.log import append_records, read_lines, read_records, validate
from kimi_recursive.records.table import read_table

__all__ = [
    "BASELINES",
    "TRAINING_LOG",
    "append_records",
    "read_lines",
    "read_records",
    "read_table",
    "validate",
]
