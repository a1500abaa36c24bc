"""A stored forecast chooses as many of its teacher's blocks as the run that trained it recorded."""

from compressor.errors import InputError
from compressor.methods.sparda.choice_record import FORECAST, RECORD_NAME, check_record, read_record
from compressor.runner.source_model import SourceModel
from compressor.verify.checks.base import Check


class Forecasts(Check):
    """Recall on the bundled novel, measured again where a record lies beside whole shards."""

    def conclude(self) -> None:
        if self.found.damage:
            return
        source, device = self.subject.source, self.subject.device
        try:
            record = read_record(source.checkpoint.folder)
            if record is None:
                return
            dtype = source.checkpoint.running_dtype(device)
            model = SourceModel(source, device=device, dtype=dtype)
            problems = check_record(model, record, quantized=source.quantized)
        except InputError as error:
            self.found.add(RECORD_NAME, [error.message], "")
            return
        recall = record.to_json()["means"][FORECAST]["recall"]
        detail = (
            f"{recall:.1%} of the teacher's blocks, as recorded, on {record.rows} x "
            f"{record.length} held-out tokens"
        )
        self.found.add("forecast recall", problems, detail)
