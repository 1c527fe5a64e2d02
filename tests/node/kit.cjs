// What the suites of clients on Node.js share: what is asked, and how a suite runs.
const assert = require("node:assert/strict");

const QUESTION = "What is the capital of France?";
const WEATHER_QUESTION = "What is the weather in Rome?";
const CITY_QUESTION = "Tell me about Paris.";
// More tokens than the node's context holds.
const LONG = "word ".repeat(9000);
// SmolLM2 is small: what it says is bounded by the schema.
const WEATHER_SCHEMA = {
  type: "object", additionalProperties: false, required: ["city"],
  properties: { city: { type: "string", maxLength: 20 } },
};

// The error that `call` ends with.
async function fails(call) {
  try {
    await call();
  } catch (error) {
    return error;
  }
  return assert.fail("no error");
}

// Runs the cases of a suite in turn: `SUITE URL MODEL`.
async function run(cases) {
  const [url, model] = process.argv.slice(2);
  for (const one of cases) {
    console.log(one.name);
    await one({ url, baseURL: `${url}/v1`, model });
  }
}

module.exports = { QUESTION, WEATHER_QUESTION, CITY_QUESTION, LONG, WEATHER_SCHEMA, fails, run };
