"""The model as MLflow loads it: this file is copied into every logged model ("models from code"), no pickle anywhere.

Weights and configuration come from the saved model beside it
(:mod:`onetrans.artifact`), so loading needs the package ``onetrans`` and nothing
else.  A row of the input is one request as :mod:`onetrans.requests` describes
it; a row of the output is one candidate.
"""

from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

from onetrans.artifact import load_model
from onetrans.requests import score


class RankingPyfunc(PythonModel):
    """Scores requests with a saved OneTrans or DCNv2+DIN."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the saved model."""
        self.model, _, _ = load_model(context.artifacts["model"])

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Return ``request_id, item_id, ctr, cvr``, one row per candidate in the order given."""
        return score(self.model, model_input.to_dict("records")).to_pandas()


mlflow.models.set_model(RankingPyfunc())
