"""instructor, in every mode that a server of OpenAI's chats can serve."""
import sys

import instructor
import kit
import openai
import pydantic
from instructor.core import InstructorRetryException


class City(pydantic.BaseModel, extra="forbid"):
    """A city."""

    name: str = pydantic.Field(max_length=20)
    population: int = pydantic.Field(ge=0, le=99_999_999)


class Anything(pydantic.BaseModel):
    """What any object of JSON is, under the name that is asked for."""

    model_config = {"title": "City"}
    name: str = ""
    population: int = 0


# The server sees to it that the answer is of the class.
ENFORCED = [instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA]
# What `MD_JSON` asks for in words only, which is too much for a small model.
MARKDOWN = r'```json\n\{"name": "[A-Z][a-z]{2,15}", "population": [1-9][0-9]{0,6}\}\n```'


def _client(node, mode):
    return instructor.from_openai(openai.OpenAI(base_url=node.base_url, api_key="unused", max_retries=0), mode=mode)


def _request(node):
    return dict(model=node.model, messages=[{"role": "user", "content": kit.CITY_QUESTION}], max_tokens=200, temperature=0)


def an_object_of_its_class_comes_in_every_mode(node):
    for mode in ENFORCED:
        city, raw = _client(node, mode).create_with_completion(**_request(node), response_model=City, max_retries=0)
        assert isinstance(city, City), (mode, city)
        assert raw.usage.completion_tokens, (mode, raw)
    found = _client(node, instructor.Mode.JSON).create(**_request(node), response_model=Anything, max_retries=0)
    assert isinstance(found, Anything), found
    city = _client(node, instructor.Mode.MD_JSON).create(**_request(node), response_model=City, max_retries=0,
                                                         extra_body={"guided_regex": MARKDOWN})
    assert isinstance(city, City), city


def a_partial_object_grows_until_it_is_one_of_its_class(node):
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        # The client asks for another class here, whose members may be missing, so the answer may differ from the whole one.
        *first, last = _client(node, mode).create_partial(**_request(node), response_model=City)
        assert first and any(part.population is None for part in first), (mode, first)
        assert City(**last.model_dump()).name, (mode, last)


def errors_are_the_classes_of_the_client(node):
    request = _request(node) | dict(model="absent")
    error = kit.fails((InstructorRetryException, openai.NotFoundError),
                      lambda: _client(node, instructor.Mode.TOOLS).create(**request, response_model=City, max_retries=0))
    assert "model_not_found" in str(error) or "absent" in str(error), error


if __name__ == "__main__":
    kit.run(sys.modules["__main__"])
