"""What several problems look like together."""

from compressor.errors import CheckError, InputError, Problems


def test_many_tensors_with_the_same_problem_are_one_line() -> None:
    alike = [InputError(f"layers.{n}.q: it holds integers", hint="h") for n in range(56)]
    other = InputError("layers.0.k: it holds integers", hint="another hint")
    found = Problems([alike[0], other, *alike[1:]]).problems
    assert [(p.message, p.hint) for p in found] == [
        ("layers.0.q and 55 more: it holds integers", "h"),
        ("layers.0.k: it holds integers", "another hint"),
    ]


def test_a_few_are_all_named_and_sentences_are_left_alone() -> None:
    few = [InputError(f"layers.{n}.q: it holds integers") for n in range(3)]
    sentences = [InputError(f"the file {n}: is damaged") for n in range(9)]
    checks = [CheckError(f"a{n}: b") for n in range(9)]
    problems = [*few, *sentences, *checks]
    assert Problems(problems).problems == problems
