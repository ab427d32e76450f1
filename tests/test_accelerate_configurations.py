"""Every file of `recipes/accelerate/` is one that accelerate reads, with nothing in it that it does not know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType

from hqqplus.recovery import processes

FOLDER = Path(__file__).parents[1] / "recipes" / "accelerate"
PATHS = sorted(FOLDER.glob("*.yaml"))
SECTIONS = ("fsdp_config", "deepspeed_config")


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def launch(path: Path) -> Any:
    """What `accelerate launch --config_file PATH -m hqqplus.train` makes of it."""
    parser = launch_command_parser()
    arguments = parser.parse_args(["--config_file", str(path), "-m", "hqqplus.train", "recipe.yaml"])
    return _validate_launch_command(arguments)[0]


def test_all_are_there() -> None:
    names = {path.stem for path in PATHS}
    assert names == {"ddp", "fsdp2", "cpu_2", "deepspeed_zero2", "deepspeed_zero3"}


def test_no_key_is_unknown(path: Path) -> None:
    config = load_config_from_file(str(path))  # refuses unknown keys at the top
    assert isinstance(config, ClusterConfig)
    assert config.num_processes == 2
    known = vars(launch_command_parser().parse_args(["script.py"]))
    values = yaml.safe_load(path.read_text())
    for section in SECTIONS:
        assert set(values.get(section, {})) <= set(known), section


def test_the_file_says_how_it_is_used(path: Path) -> None:
    text = path.read_text()
    assert f"accelerate launch --config_file recipes/accelerate/{path.name}" in text
    assert ("Not run by us" in text) == path.stem.startswith("deepspeed")


def test_kinds() -> None:
    kinds = {path.stem: load_config_from_file(str(path)).distributed_type for path in PATHS}
    assert kinds["fsdp2"] == DistributedType.FSDP
    assert kinds["ddp"] == kinds["cpu_2"] == DistributedType.MULTI_GPU
    assert kinds["deepspeed_zero2"] == kinds["deepspeed_zero3"] == DistributedType.DEEPSPEED
    for stage in (2, 3):
        assert (
            load_config_from_file(str(FOLDER / f"deepspeed_zero{stage}.yaml")).deepspeed_config["zero_stage"] == stage
        )


def test_two_processes_on_a_cpu_are_two() -> None:
    """accelerate starts a single process where it is told `--cpu`, and for the type MULTI_CPU."""
    arguments = launch(FOLDER / "cpu_2.yaml")
    assert arguments.multi_gpu
    assert arguments.use_cpu
    assert not arguments.cpu
    assert arguments.num_processes == 2


def test_fsdp2_is_what_we_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that accelerate makes of the file passes our own checks."""
    from types import SimpleNamespace

    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = launch(FOLDER / "fsdp2.yaml")
    arguments.main_process_port = 0
    for name, value in prepare_multi_gpu_env(arguments).items():
        if name.startswith(("FSDP_", "ACCELERATE_USE")):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    state: Any = SimpleNamespace(num_processes=2, distributed_type=DistributedType.MULTI_GPU)
    assert processes.is_sharded({}, state)
    processes.check_processes({"optim": "adamw_torch_fused"}, state)
