"""A stored attention policy sees as much as the run that made it recorded."""

from compressor.attention.policy import read_policy
from compressor.attention.quality_record import RECORD_NAME, check_record, read_record
from compressor.errors import InputError
from compressor.runner.source_model import SourceModel
from compressor.verify.checks.base import Check


class AttentionQuality(Check):
    """Shares of keys and attention on the bundled novel, measured again where a record lies beside
    whole shards."""

    def conclude(self) -> None:
        if self.found.damage:
            return
        source, device = self.subject.source, self.subject.device
        try:
            record = read_record(self.subject.folder)
            policy = None if record is None else read_policy(self.subject.folder)
            if record is None or policy is None:
                return
            dtype = source.checkpoint.running_dtype(device)
            model = SourceModel(source, device=device, dtype=dtype)
            problems = check_record(model, policy, record, quantized=source.quantized)
        except InputError as error:
            self.found.add(RECORD_NAME, [error.message], "")
            return
        detail = (
            f"queries see {record.means.seen:.1%} of the keys and {record.means.mass:.1%} of the "
            f"attention, as recorded, on {record.rows} x {record.length} held-out tokens"
        )
        self.found.add("attention thresholds", problems, detail)
