"""A stage of one's own: `stage: recipes/custom/stage.py:CountTokens` in a recipe runs it like any other.

stage: recipes/custom/stage.py:CountTokens
model: {base: Qwen/Qwen3-0.6B}
data: {train: data/demonstrations.jsonl}
output: runs/count
"""

from align.artifact import finish
from align.data import encode_demonstration, load
from align.identity import fingerprint
from align.settings import Data, StageSettings


class CountTokens(StageSettings):
    """Counts the tokens of some demonstrations."""

    kind = "count"
    reads = ("data", "demonstrations")  # so that `align check` reads them, and shows the first
    data: Data
    max_length: int = 4096

    def run(self, worker):
        """What the stage does, on every process; `worker` says which one this is."""
        from align.models.tokenizer import load_tokenizer
        from align.stages.running import running

        tokenizer = load_tokenizer(self.model)
        rows = load(self.data, "demonstrations").train
        with running(self, worker, fingerprint(self.model.base)):
            count = sum(len(encode_demonstration(tokenizer, row, self.max_length).input_ids) for row in rows)
            if worker.is_main:
                print(f"{count} tokens in {len(rows)} rows")
                finish(self.output, metrics={"tokens": count})
