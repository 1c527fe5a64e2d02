//! The HTTP edge as clients meet it: a real listener, a real engine over a small fake executor.

mod answers;
mod bad_input;
mod edges;
pub(crate) mod kit;
mod limits;
mod messages;
mod responses;
mod tenants;
mod tokenize;
mod tools;
