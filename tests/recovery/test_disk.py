"""A disk that takes no more in the middle of a training."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hqqplus.errors import UserError
from hqqplus.integrations.trl import RecoveryTrainer
from hqqplus.recipe import Recipe
from hqqplus.recovery.checkpoints import find_checkpoint

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("room", "said"),
    [(10_000, "a file is too large for it"), (36_000, "a file could not be written whole")],
    ids=["the adapter", "the optimizer"],
)
def test_a_checkpoint_that_does_not_fit_leaves_the_last_one(
    random_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, said: str
) -> None:
    from hqqplus.train import run

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{i} comes before {i + 1}"}) + "\n" for i in range(30)))
    recipe = Recipe.model_validate(
        {
            "model": {"name_or_path": str(random_model("llama")), "dtype": "float32"},
            "adapter": {"r": 4, "init": "default"},
            "data": {"path_or_name": str(rows), "max_length": 32, "packing": False},
            "training": {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2},
            "evaluation": {"max_tokens": 100, "parent": False},
            "output_dir": str(tmp_path / "out"),
        }
    )
    save, limits = RecoveryTrainer._save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def without_room(self: Any, *args: Any) -> None:
        if self.state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            save(self, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(RecoveryTrainer, "_save_checkpoint", without_room)
        with pytest.raises(UserError) as caught:
            run(recipe)
    text = str(caught.value)
    assert text.startswith(f"checkpoint: {output}: {said} (")
    assert text.endswith(f"{output / 'checkpoint-2'} is complete: make room and run the same command again")
    assert [path.name for path in output.glob("*checkpoint*")] == ["checkpoint-2"]
    assert find_checkpoint(output, recipe).folder == output / "checkpoint-2"
    assert run(recipe).loss_curve is not None
    assert (output / "checkpoint-4").is_dir()
