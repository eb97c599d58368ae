"""Run configs: what a YAML file and overrides may say, and what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_c2c.config import from_command_line, from_dict, load_config, override, to_dict
from mm_c2c.errors import ConfigError, InputError, run_main


@dataclass(frozen=True, kw_only=True)
class Optimiser:
    learning_rate: float = 0.1
    warmup: int = 3
    log: Path = Path("log.csv")


@dataclass(frozen=True, kw_only=True)
class Run:
    out: Path
    steps: int = 10
    name: str = "run"
    shuffle: bool = True
    limit: int | None = None
    cache: Path | None = None
    betas: tuple[float, float] = (0.9, 0.99)
    tags: tuple[str, ...] = ()
    optimiser: Optimiser = field(default_factory=Optimiser)
    stages: tuple[Optimiser, ...] = ()

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}")


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_holds_only_what_differs_from_the_defaults(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "# what it is for\nout: runs/a\nbetas: [0.5, 1]\noptimiser:\n  warmup: 7\n",
    )
    config = load_config(Run, path)
    assert config == Run(
        out=Path("runs/a"), betas=(0.5, 1.0), optimiser=Optimiser(warmup=7, learning_rate=0.1)
    )
    assert isinstance(config.out, Path)
    assert isinstance(config.betas[1], float)


def test_overrides_win_and_reach_inside(tmp_path: Path) -> None:
    path = write(tmp_path, "out: a\nsteps: 2\noptimiser:\n  warmup: 7\n")
    config = load_config(
        Run,
        path,
        ["steps=5", "optimiser.learning_rate=1", "name=a=b", "shuffle=false", "tags=[x, y]"],
    )
    assert (config.steps, config.name, config.shuffle, config.tags) == (5, "a=b", False, ("x", "y"))
    assert config.optimiser == Optimiser(learning_rate=1.0, warmup=7)
    assert isinstance(config.optimiser.learning_rate, float)


def test_an_override_may_name_a_part_that_the_file_leaves_out(tmp_path: Path) -> None:
    config = load_config(Run, write(tmp_path, ""), ["out=b", "optimiser.warmup=1"])
    assert config.optimiser.warmup == 1


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "1E-3"])
def test_small_numbers_may_be_written_as_people_write_them(tmp_path: Path, text: str) -> None:
    config = load_config(Run, write(tmp_path, f"out: a\noptimiser: {{learning_rate: {text}}}"))
    assert config.optimiser.learning_rate == 0.001


def test_what_may_be_none_is_still_converted_when_it_is_not(tmp_path: Path) -> None:
    config = load_config(Run, write(tmp_path, "out: a\ncache: c\nlimit: null\n"))
    assert config.cache == Path("c")
    assert config.limit is None
    with pytest.raises(ConfigError, match="limit: expected int, got 'all'"):
        load_config(Run, write(tmp_path, "out: a\nlimit: all\n"))


def test_configs_may_stand_in_a_list() -> None:
    config = from_dict(Run, {"out": "a", "stages": [{"warmup": 1}, {"warmup": 2}]})
    assert config.stages == (Optimiser(warmup=1), Optimiser(warmup=2))
    with pytest.raises(ConfigError, match=r"unknown key 'stages\[1\].warmpu'"):
        from_dict(Run, {"out": "a", "stages": [{"warmup": 1}, {"warmpu": 2}]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("out: a\nstep: 3", r"unknown key 'step'; did you mean 'steps'\? \(known: out, steps"),
        ("out: a\nzzz: 3", r"unknown key 'zzz' \(known: out"),
        ("out: a\noptimiser: {warm_up: 1}", r"'optimiser.warm_up'; did you mean 'warmup'\?"),
        ("out: a\nsteps: many", "steps: expected int, got 'many'"),
        ("out: a\nsteps: 2.5", "steps: expected int, got 2.5"),
        ("out: a\nsteps: true", "steps: expected int, got True"),
        ("out: a\nname: 3", "name: expected str, got 3"),
        ("out: a\nshuffle: 1", "shuffle: expected bool, got 1"),
        ("out: 3", "out: expected Path, got 3"),
        ("out: a\ntags: xy", "tags: expected tuple, got 'xy'"),
        ("out: a\ntags: [1]", r"tags\[0\]: expected str, got 1"),
        ("out: a\nbetas: [0.5]", r"betas: expected 2 values, got \[0.5\]"),
        ("out: a\noptimiser: {learning_rate: true}", "learning_rate: expected float, got True"),
        ("out: a\noptimiser: {learning_rate: fast}", "learning_rate: expected float, got 'fast'"),
        ("out: a\noptimiser: 3", "optimiser.: expected a mapping, got 3"),
        ("steps: 3", "Run: .*missing.*'out'"),
        ("out: a\nsteps: 0", "steps must be at least 1, got 0"),
        ("- out", r"run.yaml: expected a mapping, got \['out'\]"),
        ("out: [", "run.yaml is not valid YAML"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Run, write(tmp_path, text))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("steps", "expected key=value, got 'steps'"),
        ("=3", "expected key=value, got '=3'"),
        ("out.sub=3", "out.sub: 'out' is not a mapping"),
        ("optimiser.warmpu=3", r"'optimiser.warmpu'; did you mean 'warmup'\?"),
        ("tags=[a", r"'tags=\[a': the value is not valid YAML"),
    ],
)
def test_overrides_that_cannot_be_meant_are_refused(
    tmp_path: Path, assignment: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Run, write(tmp_path, "out: a"), [assignment])


def test_a_config_is_changed_as_a_file_is_and_left_as_it_was() -> None:
    config = Run(out=Path("a"), optimiser=Optimiser(warmup=7))
    changed = override(config, ["steps=5", "optimiser.learning_rate=1", "cache=b"])
    assert changed == Run(
        out=Path("a"),
        steps=5,
        cache=Path("b"),
        optimiser=Optimiser(warmup=7, learning_rate=1.0),
    )
    assert config.steps == 10
    with pytest.raises(ConfigError, match="steps must be at least 1"):
        override(config, ["steps=0"])


def test_an_override_of_a_file_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a mapping"):
        load_config(Run, write(tmp_path, "- a"), ["steps=3"])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read config .*absent\.yaml: No such file"):
        load_config(Run, tmp_path / "absent.yaml")


def test_a_command_line_gives_a_config_with_or_without_a_file(tmp_path: Path) -> None:
    path = write(tmp_path, "out: a\nsteps: 2")
    assert from_command_line(Run, [str(path), "steps=3"], file=True) == Run(out=Path("a"), steps=3)
    assert from_command_line(Run, ["out=b"]) == Run(out=Path("b"))


@pytest.mark.parametrize(
    ("words", "file", "said"),
    [
        ([], True, "required: config"),
        (["absent.yaml"], True, "cannot read config absent.yaml"),
        (["out=a", "stepz=3"], False, "did you mean 'steps'?"),
        (["--steps=3"], False, "unrecognized arguments: --steps=3"),
    ],
)
def test_a_bad_command_line_ends_in_one_line(
    words: list[str], file: bool, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        from_command_line(Run, words, file=file)
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_help_names_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        from_command_line(Run, ["--help"])
    assert "keys: out, steps, name" in " ".join(capsys.readouterr().out.split())


def test_a_script_ends_in_one_line_on_errors_of_the_library_only() -> None:
    def fail(error: Exception) -> None:
        raise error

    run_main(lambda: None)
    with pytest.raises(SystemExit, match="error: no such thing"):
        run_main(lambda: fail(InputError("no such thing")))
    with pytest.raises(ValueError, match="a bug"):
        run_main(lambda: fail(ValueError("a bug")))


optimisers: st.SearchStrategy[Any] = st.builds(
    Optimiser,
    learning_rate=st.floats(allow_nan=False, allow_infinity=False),
    warmup=st.integers(),
    log=st.sampled_from([Path("a"), Path("b/c.csv")]),
)
words = st.text(alphabet="abc e1-.=", max_size=5)


@given(
    st.builds(
        Run,
        out=st.sampled_from([Path("a"), Path("b/c")]),
        steps=st.integers(min_value=1),
        name=words,
        shuffle=st.booleans(),
        limit=st.none() | st.integers(),
        cache=st.none() | st.just(Path("c")),
        betas=st.tuples(*[st.floats(0, 1)] * 2),
        tags=st.lists(words).map(tuple),
        optimiser=optimisers,
        stages=st.lists(optimisers, max_size=2).map(tuple),
    )
)
def test_plain_values_survive_json_and_give_the_config_back(config: Run) -> None:
    assert from_dict(Run, json.loads(json.dumps(to_dict(config)))) == config
