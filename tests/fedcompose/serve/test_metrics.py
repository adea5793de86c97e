from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from fedcompose.serve.metrics import Metrics


def numbers(metrics: Metrics) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(metrics.text().decode())
    return {
        (sample.name.removeprefix("fedcompose_"), *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def test_an_answer_is_timed_from_the_request_to_each_token_and_counted_by_expert() -> None:
    now = [10.0]
    metrics = Metrics(clock=lambda: now[0])
    watch = metrics.begin()
    for seconds, expert in ((2.0, "site-a"), (0.02, "site-b"), (0.04, "site-b")):
        now[0] += seconds
        watch.token(expert)
    found = numbers(metrics)

    assert (found["time_to_first_token_seconds_count",], found["time_to_first_token_seconds_sum",]) == (1, 2)
    assert found["inter_token_seconds_count",] == 2
    assert abs(found["inter_token_seconds_sum",] - 0.06) < 1e-9
    assert (found["tokens_total", "site-a"], found["tokens_total", "site-b"]) == (1, 2)


def test_a_step_counts_its_experts_and_a_step_of_the_base_is_none() -> None:
    metrics = Metrics()
    metrics.step(2)
    metrics.step(0)
    found = numbers(metrics)

    assert (found["distinct_experts_per_step_count",], found["distinct_experts_per_step_sum",]) == (1, 2)


def test_the_queue_is_looked_up_when_somebody_reads() -> None:
    metrics, waiting = Metrics(), [3.0]
    metrics.load(waiting=lambda: waiting[0], running=lambda: 1, cache_free=lambda: waiting[0] / 8)
    waiting[0] = 4
    found = numbers(metrics)
    assert (found["requests_waiting",], found["cache_free_ratio",]) == (4, 0.5)


def test_a_stranger_cannot_make_rows() -> None:
    metrics = Metrics()
    for path in ("/health", "/a\n1", '/b"', "/v1/chat/completions/"):
        metrics.answered(path, 404)
    rows = {key[1:]: value for key, value in numbers(metrics).items() if key[0] == "requests_total"}
    assert rows == {("/health", "404"): 1, ("other", "404"): 3}
