//! Downloads and uploads against a server that behaves as a hub does, in good and in bad moods.

mod cache;
mod faults;
mod fetching;
mod kills;
mod publishing;
mod resuming;
mod support;
mod tokens;
