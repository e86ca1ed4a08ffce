"""How well a reader tells where no passage answers: SQuAD 2.0's scores, and how probable "no answer" is where it is right.

After Rajpurkar et al. 2018, section 5: a question without an accepted answer wants none, and every answer to it is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from openbook_training.reader import Prediction
from openbook_training.squad import Question, answer_scores

Scores = dict[str, NDArray[np.float64]]  # of every question that it is about, 0 to 1, by metric


def abstention_scores(predictions: Sequence[Prediction], questions: Sequence[Question], null_bias: float) -> Scores:
    """Scores of a reader that says nothing where "no answer" is more probable than its best span, as the server does.

    Args:
        questions: some with accepted answers and some without.
        null_bias: added to every "no answer" score before the two are compared, in nats.

    Returns:
        "abstaining/em" and "abstaining/f1" of all questions; "abstaining/answerable_f1" of those with an answer, where silence is
        wrong; "abstaining/unanswerable", whether it kept silent where it should; "abstaining/auroc", of each question without an
        answer the share of the others whose "no answer" stands lower beside their best span (equal ones count half), the mean of
        which is the area under the ROC curve, whatever `null_bias`.
    """
    margins = np.array([prediction.null - prediction.score for prediction in predictions])
    silent = margins + null_bias > 0
    said = ["" if quiet else prediction.text for quiet, prediction in zip(silent, predictions, strict=True)]
    scores = {what: np.array(values) for what, values in answer_scores(said, [question.answers for question in questions]).items()}
    answerable = np.array([bool(question.answers) for question in questions])
    others = np.sort(margins[answerable])
    lower, not_higher = (np.searchsorted(others, margins[~answerable], side) for side in ("left", "right"))
    return {
        "abstaining/em": scores["em"],
        "abstaining/f1": scores["f1"],
        "abstaining/answerable_f1": scores["f1"][answerable],
        "abstaining/unanswerable": silent[~answerable].astype(np.float64),
        "abstaining/auroc": (lower + not_higher) / (2 * len(others)),
    }
