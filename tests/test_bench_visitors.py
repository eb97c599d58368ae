"""The page under several visitors: what is counted, and that a mixed-up answer would be seen."""

from pathlib import Path
from typing import Any

import pytest

from mm_c2c.bench import visitors
from mm_c2c.bench.visitors import Visit, VisitorsConfig, bench
from mm_c2c.errors import ConfigError


@pytest.mark.slow
def test_two_visitors_get_their_own_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    honest = visitors._visit

    def one_wrong(setting: Any, path: Path) -> Visit:
        asked.append(path)
        visit = honest(setting, path)
        if len(asked) == 1:
            return visit
        # The second visitor expects what nobody says.
        return visit._replace(expected={question: {} for question in visit.expected})

    monkeypatch.setattr(visitors, "_visit", one_wrong)
    found = bench(VisitorsConfig(visitors=2, seconds=2, rounds=1, tiny=True))
    crowd = found["crowd"]
    assert crowd["asked"] == crowd["answered"] > 1
    assert (crowd["lost"], crowd["refused"]) == (0, {})
    wrong = asked[1].name
    assert crowd["mixed_up"]
    assert all(line.startswith(wrong) for line in crowd["mixed_up"])
    assert crowd["memory_mb"]["start"] > 0
    assert found["first_token"]["ratio"][0] > 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [("visitors", "visitors must be from 1 to"), ("seconds", "seconds must")],
)
def test_nobody_and_no_time_are_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VisitorsConfig(**{setting: 0})


def test_a_percentile_of_ten_is_not_always_their_greatest() -> None:
    found = visitors._percentiles([float(second) for second in range(10, 0, -1)])
    assert found == {"p50": 5.0, "p90": 9.0, "p99": 10.0, "most": 10.0}
    assert visitors._percentiles([3.0]) == dict.fromkeys(("p50", "p90", "p99", "most"), 3.0)
