"""What the suites of clients share: what is asked, and how a suite runs.

A suite is a module with functions that take a `Node`; the first failed assertion ends it with a traceback.
"""
import sys

QUESTION = "What is the capital of France?"
MESSAGES = [{"role": "user", "content": QUESTION}]
WEATHER_QUESTION = "What is the weather in Rome?"
# SmolLM2 is small: what it says is bounded by the schema.
WEATHER_SCHEMA = {"type": "object", "additionalProperties": False, "required": ["city"],
                  "properties": {"city": {"type": "string", "maxLength": 20}}}
WEATHER = {"type": "function",
           "function": {"name": "get_weather", "description": "Weather of a city.", "parameters": WEATHER_SCHEMA}}
CITY_QUESTION = "Tell me about Paris."
# More tokens than the node's context holds.
LONG = "word " * 9000


class Node:
    """Where a node answers."""

    def __init__(self, url, model):
        self.url = url
        self.base_url = url + "/v1"
        self.model = model


def fails(kind, call):
    """The error of the client's own class that `call` raises."""
    try:
        answer = call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__} but {answer!r}")


def run(module):
    """Runs the functions of a suite that begin no name with an underscore: `SUITE URL MODEL`."""
    node = Node(*sys.argv[1:3])
    own = [f for f in vars(module).values() if callable(f) and getattr(f, "__module__", None) == "__main__"]
    cases = [f for f in own if not isinstance(f, type) and not f.__name__.startswith("_")]
    assert cases
    for case in cases:
        print(case.__name__, flush=True)
        case(node)
