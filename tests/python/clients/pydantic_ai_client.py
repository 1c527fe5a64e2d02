"""pydantic-ai, by its model for OpenAI's chats."""
import asyncio
import sys

import kit
import pydantic
from pydantic_ai import Agent, ModelHTTPError, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class City(pydantic.BaseModel, extra="forbid"):
    """A city."""

    name: str = pydantic.Field(max_length=20)
    population: int = pydantic.Field(ge=0, le=99_999_999)


def _agent(node, model=None, max_tokens=30, **more):
    provider = OpenAIProvider(base_url=node.base_url, api_key="unused")
    settings = {"temperature": 0, "max_tokens": max_tokens}
    return Agent(OpenAIChatModel(model or node.model, provider=provider), model_settings=settings, **more)


def a_chat_is_the_same_whole_and_streamed(node):
    agent = _agent(node)
    whole = agent.run_sync(kit.QUESTION)
    assert "Paris" in whole.output, whole

    async def streamed():
        async with agent.run_stream(kit.QUESTION) as result:
            return "".join([piece async for piece in result.stream_text(delta=True, debounce_by=None)])

    assert asyncio.run(streamed()) == whole.output


def structured_output_is_an_object_of_its_class_by_every_form(node):
    for form in (ToolOutput, NativeOutput):
        city = _agent(node, max_tokens=200, output_type=form(City)).run_sync(kit.CITY_QUESTION).output
        assert isinstance(city, City), (form, city)


def a_tool_that_has_to_be_called_is_called(node):
    asked = []
    agent = _agent(node, max_tokens=200, output_type=ToolOutput(City, name="city_found"))

    @agent.output_validator
    def note(city: City) -> City:
        asked.append(city)
        return city

    agent.run_sync(kit.CITY_QUESTION)
    assert len(asked) == 1, asked


def errors_are_the_classes_of_the_client(node):
    error = kit.fails(ModelHTTPError, lambda: _agent(node, model="absent").run_sync(kit.QUESTION))
    assert error.status_code == 404, error
    error = kit.fails(ModelHTTPError, lambda: _agent(node).run_sync(kit.LONG))
    assert error.status_code == 400 and "context" in str(error.body), error


if __name__ == "__main__":
    kit.run(sys.modules["__main__"])
