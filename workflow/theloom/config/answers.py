"""Settings of `answers` that make no sense together."""

from theloom.config.schema import AnswersConfig, Config
from theloom.errors import ConfigError

COLUMNS = ("answer_prompt", "answer_sample", "answer_stop")
"""What the run says of each answer, beside the columns of the corpus."""

_DRAWING = ("temperature", "top_p", "top_k", "seed", "stop", "samples", "max_new_tokens", "batch")


def check(config: Config) -> None:
    """Check the section `answers`.

    Args:
        config: The composed config of a run.

    Raises:
        ConfigError: A value is out of its range, or of no use with another one.
    """
    answers = config.answers
    if answers.source is None:
        _check_unset(answers)
        return
    for name in COLUMNS:
        if name in config.corpus.columns:
            raise ConfigError(
                f"corpus.columns: {name!r} is what a run with answers calls a column of its own; "
                "rename the corpus' column"
            )
    if answers.source.name == "column":
        _check_column(answers)
        return
    if answers.column is not None:
        raise ConfigError(
            "answers.column: is for answers.source=column alone; set that, or take it out"
        )
    if not 0 <= answers.temperature < float("inf"):
        raise ConfigError(
            f"answers.temperature: {answers.temperature} is no temperature; give 0 for the most "
            "probable token, or a number above"
        )
    if not 0 < answers.top_p <= 1:
        raise ConfigError(f"answers.top_p: {answers.top_p} is not above 0 and at most 1")
    if not answers.temperature:
        for key, value in {"top_p": answers.top_p < 1, "top_k": answers.top_k}.items():
            if value:
                raise ConfigError(
                    f"answers.{key}: nothing is drawn at temperature 0; set answers.temperature "
                    "above 0, or take it out"
                )
        if answers.samples > 1:
            raise ConfigError(
                f"answers.samples: all {answers.samples} answers would be the same at temperature "
                "0; set answers.temperature above 0"
            )
    if not all(answers.stop):
        raise ConfigError("answers.stop: an empty text ends nothing; take it out")
    if config.extraction.execution.name == "layerwise":
        raise ConfigError(
            "answers.source=model: a model that runs layer by layer is read from disk for each "
            "token, too slowly to sample; sample with another engine and set "
            "answers.source=column, or set extraction.execution=resident"
        )


def _check_unset(answers: AnswersConfig) -> None:
    default = AnswersConfig()
    for key in ("column", *_DRAWING):
        if getattr(answers, key) != getattr(default, key):
            raise ConfigError(
                f"answers.{key}: is of use with answers.source alone; set answers.source=model or "
                "column, or take it out"
            )


def _check_column(answers: AnswersConfig) -> None:
    if answers.column is None:
        raise ConfigError(
            "answers.column: not set; answers.source=column needs it: answers.column=outputs"
        )
    default = AnswersConfig()
    for key in _DRAWING:
        if getattr(answers, key) != getattr(default, key):
            raise ConfigError(
                f"answers.{key}: is for answers.source=model alone, the column has the answers as "
                "they are; take it out"
            )
