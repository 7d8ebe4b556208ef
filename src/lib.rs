//! vmflow: a vhost-user-net backend that knows whose frame it is.
//!
//! It sits between a VM's virtqueues and a tap, and answers for every VM on the host: what did this VM really
//! send and receive, was any of it suspect, and was that stopped? The answer holds where VMs share an address
//! or sit behind NAT, because the identity is not read from packets: it is the label of the virtqueue that a
//! frame came through, given before any front end connects.
//!
//! # Processes
//!
//! ```text
//!  vmflow serve   monitor      owns taps, sockets, labels, policies; reads ledgers; answers the API
//!    |
//!    +-- port --- keeper       the front end's connection: looks at each vhost-user message (the gate);
//!    |              |          one thread, never maps guest memory; when its worker dies, it forks another one
//!    |            worker       forked by the keeper: maps guest memory, moves frames, writes the ledger
//!    +-- port --- ...
//! ```
//!
//! One keeper and one worker for each port: a guest or VMM that breaks its port breaks only itself. In the worker
//! each queue pair has a thread of its own, with a queue of the tap and a part of the ledger of its own. Both run
//! as a user of their own, without capabilities, in empty network and mount namespaces. The ledger is shared
//! memory that the monitor made, and outlives them; whose ledger it is, the monitor knows, so not even a
//! broken worker can speak for another VM. What a worker had done when it died is in the ledger too, frame by
//! frame: its successor counts it ([`ledger::recover`]), and the front end and the guest notice nothing.
//!
//! # The tree is the path of a frame
//!
//! | module | what it is |
//! |---|---|
//! | [`config`], [`cli`] | what the operator wrote: loose as written, then strict as meant |
//! | [`log`] | log lines: how much, and in what form |
//! | [`label`] | the numbers that VMs are known by |
//! | [`features`] | what a port offers |
//! | [`monitor`] | start-up order; [`monitor::change`] VMs come, change and go, [`monitor::make`] what ports are made of, [`monitor::registry`] labels and [`monitor::added`] added VMs on disk, [`monitor::checkpoint`] totals on disk, [`monitor::state`] all of these to be taken elsewhere, [`monitor::doorbell`] front ends come, [`monitor::ports`] one port's life, [`monitor::tally`] what is counted of it, [`monitor::connection`] one connection's, [`monitor::spawn`] keepers start, [`monitor::link`] the tap as an interface, [`monitor::api`] HTTP on unix sockets, [`monitor::host`] what it is about |
//! | [`tap`] | taps: made, taken over, set up; [`tap::Queues`] |
//! | [`keeper`] | one connection: [`keeper::message`] vhost-user on the wire, [`keeper::gate`] what is let through, [`keeper::memory`] regions, [`keeper::session`] what the next worker must be told, [`keeper::watch`] and [`keeper::deaths`] whether there is to be one, [`keeper::door`] rights given up, [`keeper::worker`] the session with the worker |
//! | [`worker`] | [`worker::device`] events to queue pairs, [`worker::pair`] one pair's turns, [`worker::queues`] which queues of the tap are attached, [`worker::vring`] the crate's ring, mended |
//! | [`path`] | a frame from ring to tap and from tap to ring: take, label, inspect, judge, [`path::coalesce`] or [`path::place`], forward, account, publish |
//! | [`wire`] | what a frame's bytes say: pure functions |
//! | [`policy`] | what a worker is told to do, and how it reaches it |
//! | [`ledger`] | what was counted |
//! | [`client`] | what the other subcommands show; [`client::doctor`] what is wrong with a host, [`client::libvirt`] libvirt's hook |
//!
//! # What holds everywhere
//!
//! * **Directions are the guest's**: *transmit* is what the guest sends.
//! * **The ledger balances** at any time between two batches ([`ledger::totals`]), and a batch is in the ledger
//!   before the guest can see that it is done.
//! * **The bytes that are judged are the bytes that are sent**: guest memory is read once, by copy, and the
//!   virtio-net header is rebuilt ([`wire::vnet`]).
//! * **An order that matters is a type** ([`path`]): a frame cannot be forwarded before its verdict, nor given
//!   back uncounted.
//! * **Every frame is counted on its own**, before it is put together with others for one write to the tap.
//! * **A guest can cause a counted drop**: never an error, a panic, an allocation or an unlimited log line.
//! * `unsafe` is in a few files, each named in `tests/style.rs`.

pub mod cli;
pub mod client;
pub mod config;
pub mod features;
pub mod keeper;
pub mod label;
pub mod ledger;
pub mod log;
pub mod monitor;
pub mod path;
pub mod policy;
pub mod tap;
pub mod wire;
pub mod worker;
