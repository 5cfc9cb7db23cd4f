"""What the disambiguation service and its clients say to each other: typed questions and answers.

The service validates by these models and publishes them as its OpenAPI; `service/client.py` returns
them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from ray_synth.meaning.names import one_plain_line

Name = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=200),
    AfterValidator(one_plain_line),
]
# strict: JSON's false is not a number
Count = Annotated[int, Field(ge=0, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
Picture = Annotated[
    str,
    Field(
        min_length=1,
        description="base64 of an image file, a data: URL, or the https URL of an allowed host",
    ),
]


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ClassQuestion(Message):
    """One class name, its images, and what is already known of its meanings."""

    class_name: Name
    images: list[Picture] = Field(default_factory=list)
    meanings: list[Name] | None = Field(None, max_length=50, description="candidates to add")


class Asking(Message):
    """How a question is answered."""

    context: Name | None = Field(
        None, description="instead of images or beside them: 'from a list of farm animals'"
    )
    num_meanings: Count = Field(5, le=20, description="phrases asked from the LLM; 0: none")
    seed: Seed = 0


class DisambiguateBody(ClassQuestion, Asking):
    """Which meaning of a class name do these images show, or does this context speak of?"""


class BatchBody(Asking):
    """A whole class list: the classes of one data set inform each other."""

    classes: list[ClassQuestion] = Field(min_length=1)


class PromptsBody(Message):
    """Prompts for a class (paper, section 3.2)."""

    class_name: Name
    meaning: Name | None = None
    contextual: Count = 5
    stylized: Count = 5
    seed: Seed = 0


class CandidateAnswer(BaseModel):
    """One meaning; best first in an answer."""

    meaning: str
    score: float = Field(description="nats that speak for it")
    deviations: float = Field(description="standard deviations above images of other things")
    similarity: float = Field(description="mean cosine similarity to the images")
    probability: float
    answers: int = Field(description="how many of the LLM's answers gave it")
    source: Literal["llm", "user", "lexicon", "name"]
    merged: list[str] = Field(default_factory=list, description="phrases that mean the same")


class Answer(BaseModel):
    """The class's entry of meanings.json."""

    model_config = ConfigDict(protected_namespaces=())

    class_name: str
    choice: str
    confidence: float = Field(description="probability of the choice")
    ambiguous: bool = Field(description="it cannot tell: give more images, or a context")
    margin: float | None = Field(None, description="score of the choice over the next")
    candidates: list[CandidateAnswer]
    context: str | None = None
    num_images: int
    num_refused: int = Field(description="pieces of the LLM's answers that were not phrases")
    raw_answers: list[str]
    llm: str
    clip: str


class Problem(BaseModel):
    """An error, as application/problem+json (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    request_id: str | None = None


class Line(BaseModel):
    """One line of a batch's stream: a class's answer, or what was wrong with it."""

    class_name: str
    answer: Answer | None = None
    problem: Problem | None = None


class ContextualPrompt(BaseModel):
    prompt: str
    source: Literal["llm", "pool"]


class StylizedPrompt(BaseModel):
    prompt: str
    style: str


class PromptsAnswer(BaseModel):
    """Prompts of both kinds."""

    class_name: str
    meaning: str
    contextual: list[ContextualPrompt]
    stylized: list[StylizedPrompt]


class LimitsAnswer(BaseModel):
    """What one request may bring."""

    max_images: int
    max_image_bytes: int
    max_pixels: int
    max_body_bytes: int
    max_classes: int
    token_required: bool


ModelsAnswer = dict[str, dict[str, Any]]
