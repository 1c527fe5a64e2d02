// OpenAI's client for Node.js.
const assert = require("node:assert/strict");
const OpenAI = require("openai").default;
const kit = require("./kit.cjs");

const client = (node) => new OpenAI({ baseURL: node.baseURL, apiKey: "unused", maxRetries: 0 });
const chat = (node, more) => ({
  model: node.model, messages: [{ role: "user", content: kit.QUESTION }], max_tokens: 30, temperature: 0, ...more,
});
const WEATHER = { type: "function", function: { name: "get_weather", description: "Weather of a city.", parameters: kit.WEATHER_SCHEMA } };

async function aChatIsTheSameWholeAndStreamed(node) {
  const whole = await client(node).chat.completions.create(chat(node));
  const text = whole.choices[0].message.content;
  assert.match(text, /Paris/);
  let streamed = "";
  const stream = await client(node).chat.completions.create(chat(node, { stream: true, stream_options: { include_usage: true } }));
  let usage;
  for await (const chunk of stream) {
    streamed += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(streamed, text);
  assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
  const helper = client(node).chat.completions.stream(chat(node));
  assert.equal((await helper.finalChatCompletion()).choices[0].message.content, text);
}

async function aCallThatIsRequiredComesWholeAndStreamed(node) {
  const request = chat(node, {
    messages: [{ role: "user", content: kit.WEATHER_QUESTION }], tools: [WEATHER], tool_choice: "required",
    parallel_tool_calls: false, max_tokens: 100,
  });
  const whole = await client(node).chat.completions.create(request);
  assert.equal(whole.choices[0].finish_reason, "tool_calls");
  const [call] = whole.choices[0].message.tool_calls;
  assert.equal(call.function.name, "get_weather");
  assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)), ["city"]);
  const final = await client(node).chat.completions.stream(request).finalChatCompletion();
  assert.equal(final.choices[0].message.tool_calls[0].function.arguments, call.function.arguments);
}

async function aParsedAnswerFollowsItsSchema(node) {
  const schema = {
    type: "object", additionalProperties: false, required: ["name", "population"],
    properties: { name: { type: "string", maxLength: 20 }, population: { type: "integer", minimum: 0, maximum: 99999999 } },
  };
  const answer = await client(node).chat.completions.parse(chat(node, {
    messages: [{ role: "user", content: kit.CITY_QUESTION }], max_tokens: 200,
    response_format: { type: "json_schema", json_schema: { name: "city", strict: true, schema } },
  }));
  assert.deepEqual(Object.keys(answer.choices[0].message.parsed), ["name", "population"]);
}

async function errorsAreTheClassesOfTheClient(node) {
  const unknown = await kit.fails(() => client(node).chat.completions.create(chat(node, { model: "absent" })));
  assert(unknown instanceof OpenAI.NotFoundError, unknown);
  assert.equal(unknown.code, "model_not_found");
  const long = [{ role: "user", content: kit.LONG }];
  const over = await kit.fails(() => client(node).chat.completions.create(chat(node, { messages: long })));
  assert(over instanceof OpenAI.BadRequestError, over);
  assert.equal(over.code, "context_length_exceeded");
}

kit.run([aChatIsTheSameWholeAndStreamed, aCallThatIsRequiredComesWholeAndStreamed, aParsedAnswerFollowsItsSchema,
  errorsAreTheClassesOfTheClient]);
