#!/usr/bin/env python3
"""Drives a node with the official `openai` package, unmodified.

    client.py BASE_URL MODEL GROUP

Runs the functions of one group below; the first failed assertion ends it with a traceback.
"""
import asyncio
import json
import sys

import openai
import pydantic

PROMPT = "The quick brown fox"
MESSAGES = [{"role": "user", "content": "Say something."}]


def text_of(stream):
    return "".join(c.choices[0].text for c in stream if c.choices)


class Answers:
    """What a healthy node answers."""

    def models_are_listed(client, model):
        models = client.models.list().data
        assert [m.id for m in models] == [model], models
        assert models[0].object == "model"
        assert client.models.retrieve(model).id == model

    def a_chat_is_answered_whole_and_streamed_with_the_same_text(client, model):
        request = dict(model=model, messages=MESSAGES, max_tokens=24, temperature=0)
        whole = client.chat.completions.create(**request)
        choice = whole.choices[0]
        assert whole.object == "chat.completion" and whole.model == model and whole.id
        assert choice.message.role == "assistant" and choice.finish_reason in ("stop", "length")
        assert whole.usage.completion_tokens <= 24 and 3 < whole.usage.prompt_tokens
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens

        chunks = list(client.chat.completions.create(**request, stream=True,
                                                     stream_options={"include_usage": True}))
        assert {c.id for c in chunks} == {chunks[0].id} and {c.object for c in chunks} == {"chat.completion.chunk"}
        assert chunks[0].choices[0].delta.role == "assistant"
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == choice.message.content, (text, choice.message.content)
        reasons = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
        assert reasons == [choice.finish_reason]
        assert not chunks[-1].choices and chunks[-1].usage == whole.usage, chunks[-1]
        assert all(c.usage is None for c in chunks[:-1])

    def the_stream_helper_collects_the_same_chat(client, model):
        request = dict(model=model, messages=MESSAGES, max_tokens=24, temperature=0)
        text = client.chat.completions.create(**request).choices[0].message.content
        # The helper takes an answer that ends by its length for a failure.
        stop = text[len(text) // 2:len(text) // 2 + 4]
        with client.chat.completions.stream(**request, stop=stop) as stream:
            final = stream.get_final_completion()
        assert final.choices[0].message.content == text[:text.index(stop)], final

    def a_completion_is_answered_whole_and_streamed_with_the_same_text(client, model):
        request = dict(model=model, prompt=PROMPT, max_tokens=24, temperature=0)
        whole = client.completions.create(**request)
        assert whole.object == "text_completion" and whole.choices[0].finish_reason in ("stop", "length")
        chunks = list(client.completions.create(**request, stream=True,
                                                stream_options={"include_usage": True}))
        assert text_of(chunks) == whole.choices[0].text
        assert chunks[-1].usage == whole.usage

    def stop_strings_cut_the_text(client, model):
        request = dict(model=model, prompt=PROMPT, max_tokens=40, temperature=0,
                       extra_body={"ignore_eos": True})
        text = client.completions.create(**request).choices[0].text
        # Longer than a token, so that it lies across the borders of chunks.
        stop = text[len(text) // 2:len(text) // 2 + 5]
        expected = text[:text.index(stop)]
        cut = client.completions.create(**request, stop=["never in the text", stop])
        assert (cut.choices[0].text, cut.choices[0].finish_reason) == (expected, "stop"), (cut, stop)
        assert cut.usage.completion_tokens < 40
        chunks = list(client.completions.create(**request, stop=stop, stream=True))
        assert text_of(chunks) == expected
        assert chunks[-1].choices[0].finish_reason == "stop"

    def two_choices_differ_and_the_seed_decides(client, model):
        request = dict(model=model, messages=MESSAGES, max_tokens=24, temperature=1.0, n=2)
        first = client.chat.completions.create(**request, seed=7)
        texts = [c.message.content for c in first.choices]
        assert [c.index for c in first.choices] == [0, 1] and texts[0] != texts[1], texts
        again = client.chat.completions.create(**request, seed=7)
        assert [c.message.content for c in again.choices] == texts
        other = client.chat.completions.create(**request, seed=8)
        assert [c.message.content for c in other.choices] != texts
        streamed = ["", ""]
        for chunk in client.chat.completions.create(**request, seed=7, stream=True):
            for choice in chunk.choices:
                streamed[choice.index] += choice.delta.content or ""
        assert streamed == texts, (streamed, texts)

    def log_probabilities_fit_the_choice(client, model):
        answer = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=8, temperature=0,
                                                logprobs=True, top_logprobs=3)
        entries = answer.choices[0].logprobs.content
        assert 0 < len(entries) <= 8
        for entry in entries:
            assert entry.logprob <= 0 and len(entry.top_logprobs) == 3
            assert entry.token == entry.top_logprobs[0].token, "greedy takes the likeliest"
            assert entry.logprob == entry.top_logprobs[0].logprob
            likeliness = [top.logprob for top in entry.top_logprobs]
            assert likeliness == sorted(likeliness, reverse=True)
        plain = client.completions.create(model=model, prompt=PROMPT, max_tokens=4, temperature=0, logprobs=2)
        lists = plain.choices[0].logprobs
        n = len(lists.tokens)
        assert 0 < n and n == len(lists.token_logprobs) == len(lists.top_logprobs) == len(lists.text_offset)

    def several_prompts_are_answered_in_their_order(client, model):
        alone = [client.completions.create(model=model, prompt=p, max_tokens=6, temperature=0).choices[0].text
                 for p in ("one", "two")]
        both = client.completions.create(model=model, prompt=["one", "two"], max_tokens=6, temperature=0)
        assert [c.text for c in both.choices] == alone


class Thoughts:
    """A model that thinks before it speaks."""

    def reasoning_is_told_from_content(client, model):
        request = dict(model=model, messages=MESSAGES, max_tokens=12, temperature=0)
        thinking = {"thinking": {"type": "enabled"}, "ignore_eos": True}
        message = client.chat.completions.create(**request, extra_body=thinking).choices[0].message
        # These weights never end a thought.
        assert message.reasoning_content and not message.content, message
        chunks = client.chat.completions.create(**request, extra_body=thinking, stream=True)
        deltas = [c.choices[0].delta for c in chunks if c.choices]
        assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == message.reasoning_content
        plain = {"thinking": {"type": "disabled"}, "ignore_eos": True}
        message = client.chat.completions.create(**request, extra_body=plain).choices[0].message
        assert message.content and not getattr(message, "reasoning_content", None), message


class Knowledge:
    """What only real weights answer."""

    def a_fact_is_known(client, model):
        answer = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "What is the capital of France?"}],
            max_tokens=12, temperature=0)
        assert "Paris" in answer.choices[0].message.content, answer

    def the_bytes_of_the_tokens_are_the_text(client, model):
        answer = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=12, temperature=0,
                                                logprobs=True)
        entries = answer.choices[0].logprobs.content
        text = b"".join(bytes(e.bytes) for e in entries).decode()
        assert text == answer.choices[0].message.content, (text, answer)

    def special_tokens_in_user_text_end_no_turn(client, model):
        def n_tokens(text):
            request = dict(model=model, messages=[{"role": "user", "content": text}], max_tokens=1)
            return client.chat.completions.create(**request).usage.prompt_tokens
        # As text the name of a special token takes several tokens.
        assert n_tokens("a") + 3 < n_tokens("a<|im_end|>")


WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Weather of a city.", "parameters": {
    "type": "object", "additionalProperties": False, "required": ["city", "unit"],
    "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"type": "string", "enum": ["c", "f"]}}}}}


class Tools:
    """Calls and answers of a given shape, by a model that knows neither."""

    def a_required_call_comes_whole_and_streamed_and_its_result_is_taken(client, model):
        messages = [{"role": "user", "content": "What is the weather in Rome?"}]
        request = dict(model=model, messages=messages, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False,
                       max_tokens=200, temperature=0)
        message = client.chat.completions.create(**request).choices[0].message
        [call] = message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert call.function.name == "get_weather" and sorted(arguments) == ["city", "unit"], call
        with client.chat.completions.stream(**request) as stream:
            final = stream.get_final_completion().choices[0]
        assert final.finish_reason == "tool_calls", final
        assert final.message.tool_calls[0].function.arguments == call.function.arguments, final
        messages += [message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "21 C, sunny"}]
        answer = client.chat.completions.create(model=model, messages=messages, tools=[WEATHER], max_tokens=30, temperature=0)
        assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls"), answer

    def a_parsed_answer_is_an_object_of_its_class(client, model):
        class City(pydantic.BaseModel):
            name: str = pydantic.Field(max_length=20)
            country: str = pydantic.Field(max_length=20)
            population: int = pydantic.Field(ge=0, le=99_999_999)

        answer = client.chat.completions.parse(model=model, messages=[{"role": "user", "content": "Tell me about Paris."}],
                                               response_format=City, max_tokens=200, temperature=0)
        assert isinstance(answer.choices[0].message.parsed, City), answer

    def json_mode_gives_an_object(client, model):
        answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Give me JSON with one key."}],
                                                response_format={"type": "json_object"}, max_tokens=300, temperature=0)
        choice = answer.choices[0]
        assert choice.message.content.startswith("{"), choice
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict), choice


def fails(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


class Responses:
    """The Responses API, without a memory."""

    def an_answer_is_the_same_whole_and_streamed(client, model):
        request = dict(model=model, instructions="Be brief.", input="What is the capital of France?", max_output_tokens=30, temperature=0)
        whole = client.responses.create(**request)
        assert whole.status == "completed" and "Paris" in whole.output_text, whole
        assert 0 < whole.usage.output_tokens <= 30 and whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens, whole
        with client.responses.stream(**request) as stream:
            events = list(stream)
            final = stream.get_final_response()
        text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
        assert text == whole.output_text == final.output_text, final
        assert [e.sequence_number for e in events] == list(range(len(events))), events
        assert events[0].type == "response.created" and events[-1].type == "response.completed", events
        counted = client.responses.input_tokens.count(model=model, instructions="Be brief.", input="What is the capital of France?")
        assert counted.input_tokens == whole.usage.input_tokens, counted

    def an_answer_cut_short_says_so(client, model):
        answer = client.responses.create(model=model, input="What is the capital of France?", max_output_tokens=2, temperature=0)
        assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens"), answer

    def a_call_that_is_required_comes_and_its_result_is_taken(client, model):
        tool = {"type": "function", "name": "get_weather", "description": "Weather of a city.", "strict": True, "parameters": {
            "type": "object", "additionalProperties": False, "required": ["city"], "properties": {"city": {"type": "string", "maxLength": 20}}}}
        items = [{"role": "user", "content": "What is the weather in Rome?"}]
        request = dict(model=model, tools=[tool], tool_choice="required", parallel_tool_calls=False, max_output_tokens=100, temperature=0)
        whole = client.responses.create(**request, input=items)
        [call] = whole.output
        assert call.type == "function_call" and list(json.loads(call.arguments)) == ["city"], whole
        with client.responses.stream(**request, input=items) as stream:
            events = list(stream)
            [streamed] = stream.get_final_response().output
        assert (streamed.name, streamed.arguments) == (call.name, call.arguments), streamed
        assert streamed.parsed_arguments == json.loads(call.arguments), streamed
        assert any(e.type == "response.function_call_arguments.done" for e in events), events
        items += [call.to_dict(), {"type": "function_call_output", "call_id": call.call_id, "output": "21 C, sunny"}]
        answer = client.responses.create(model=model, tools=[tool], input=items, max_output_tokens=30, temperature=0)
        assert answer.status in ("completed", "incomplete"), answer

    def a_parsed_answer_is_an_object_of_its_class(client, model):
        class City(pydantic.BaseModel):
            name: str = pydantic.Field(max_length=20)
            population: int = pydantic.Field(ge=0, le=99_999_999)

        answer = client.responses.parse(model=model, input="Tell me about Paris.", text_format=City, max_output_tokens=200, temperature=0)
        assert isinstance(answer.output_parsed, City), answer

    def what_needs_a_memory_is_a_bad_request_that_names_it(client, model):
        error = fails(openai.BadRequestError,
                      lambda: client.responses.create(model=model, input="Hi", previous_response_id="resp-1"))
        assert error.param == "previous_response_id", error
        fails(openai.NotFoundError, lambda: client.responses.retrieve("resp-1"))


class Errors:
    """Errors arrive as the classes that programs catch."""

    def an_unknown_model_is_not_found(client, model):
        error = fails(openai.NotFoundError,
                      lambda: client.chat.completions.create(model="absent", messages=MESSAGES))
        assert error.status_code == 404 and error.code == "model_not_found" and error.param == "model", error
        assert model in error.message, "it says what is served"
        fails(openai.NotFoundError, lambda: client.models.retrieve("absent"))

    def a_prompt_beyond_the_context_is_a_bad_request(client, model):
        error = fails(openai.BadRequestError,
                      lambda: client.completions.create(model=model, prompt=[5] * 100_000))
        assert error.code == "context_length_exceeded" and error.param == "prompt", error
        error = fails(openai.BadRequestError,
                      lambda: client.completions.create(model=model, prompt=[5] * 100_000, stream=True))
        assert error.code == "context_length_exceeded", error

    def a_wrong_parameter_is_a_bad_request_that_names_it(client, model):
        error = fails(openai.BadRequestError,
                      lambda: client.chat.completions.create(model=model, messages=MESSAGES, temperature=9))
        assert error.param == "temperature" and error.type == "invalid_request_error", error

    def a_full_queue_is_a_rate_limit_with_a_time(client, model):
        once = client.with_options(max_retries=0)
        hold = dict(model=model, prompt=[1], max_tokens=8000, stream=True, extra_body={"ignore_eos": True})
        running = once.completions.create(**hold)
        assert next(iter(running)).choices, "it runs, so the queue is empty"
        held, error = [running], None
        for _ in range(8):
            try:
                held.append(once.completions.create(**hold))
            except openai.RateLimitError as refused:
                error = refused
                break
        assert error is not None, f"the queue took {len(held)} requests"
        assert 2 <= len(held), "nothing may wait behind the one that runs"
        assert error.code == "queue_full" and 1 <= int(error.response.headers["retry-after"]), error
        for stream in held:
            stream.close()
        # The client's own retries find the place that became free.
        client.completions.create(model=model, prompt=[1], max_tokens=1)


class Cancels:
    """Closed streams end their requests."""

    def closing_a_stream_ends_the_request(client, model):
        for _ in range(3):
            stream = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=3000, stream=True,
                                                    extra_body={"ignore_eos": True})
            assert next(iter(stream)).choices
            stream.close()

    def a_timeout_of_the_client_ends_the_request(client, model):
        fails(openai.APITimeoutError,
              lambda: client.with_options(timeout=0.2, max_retries=0).completions.create(
                  model=model, prompt=PROMPT, max_tokens=3000, extra_body={"ignore_eos": True}))


class Crowd:
    """Many at once."""

    def sixteen_at_once_get_what_each_gets_alone(client, model):
        requests = [dict(model=model, prompt=f"Number {i}:", max_tokens=16, temperature=0.8, seed=i)
                    for i in range(16)]
        alone = [client.completions.create(**request).choices[0].text for request in requests]

        async def together():
            async with openai.AsyncOpenAI(base_url=client.base_url, api_key="unused") as crowd:
                async def one(i, request):
                    if i % 2:
                        stream = await crowd.completions.create(**request, stream=True)
                        return "".join([c.choices[0].text async for c in stream if c.choices])
                    return (await crowd.completions.create(**request)).choices[0].text
                return await asyncio.gather(*(one(i, r) for i, r in enumerate(requests)))

        texts = asyncio.run(together())
        assert texts == alone, (texts, alone)


def main():
    base_url, model, group = sys.argv[1:]
    client = openai.OpenAI(base_url=base_url, api_key="unused")
    cases = [f for f in vars(globals()[group]).values() if callable(f)]
    assert cases
    for case in cases:
        print(case.__name__, flush=True)
        case(client, model)


if __name__ == "__main__":
    main()
