//! What a port is made of that only the host can give: its socket, its tap, memory for its ledger.
//!
//! What a port that ends has, and one that begins wants, goes from the one to the other: nobody else can take
//! it in between, and a front end that connects meanwhile waits.

use std::{collections::HashMap, io, path::PathBuf, rc::Rc};

use super::{
    change::blocking,
    checkpoint::PortCounters,
    doorbell::{Doorbell, Listening},
    link::{self, LinkError, Wanted},
    listen::BindError,
    ports::Port,
    tally::Tally,
};
use crate::{
    config,
    keeper::brief::Brief,
    ledger::LedgerError,
    tap::{self, Queues, TapError},
};

/// Why a port cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    /// Its socket is not to be had.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// Its tap is not to be had.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// Its tap cannot be set up.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// There is no memory for its ledger.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// There is no descriptor left.
    #[error("tap {0}: cannot have another descriptor of it: {1}")]
    Descriptor(String, io::Error),
    /// A tap of that name is where taps are made, before they are moved.
    #[error("tap {tap}: VM {vm:?} has one of that name outside of {netns}: remove that first, or choose another name", netns = .netns.display())]
    InTheWay {
        /// The name.
        tap: String,
        /// Whose it is.
        vm: String,
        /// Where the new one was to go.
        netns: PathBuf,
    },
}

/// A port that is to begin.
#[derive(Debug)]
pub struct Wish {
    /// Its settings.
    pub config: config::Port,
    /// What its keepers are told; the tap's MTU and offloads are not known yet.
    pub brief: Brief,
    /// What is counted of it so far, if it is there.
    pub tally: Option<Rc<Tally>>,
    /// What was counted of it when it was there last; a tally is newer.
    pub counted: PortCounters,
}

/// What it will be made of.
#[derive(Debug)]
pub struct Made {
    /// Its settings.
    pub config: config::Port,
    /// Where its front ends come from.
    pub doorbell: Doorbell,
    /// Its tap.
    pub tap: Queues,
    /// What its keepers are told.
    pub brief: Brief,
    /// What is counted of it.
    pub tally: Rc<Tally>,
    /// The port that has the tap until it ends.
    tap_of: Option<Rc<Port>>,
    /// The port that has the socket until it ends.
    socket_of: Option<Rc<Port>>,
}

/// Makes what the wishes want, in their order: first all sockets, then all taps. `there` are the ports that run,
/// `ending` those of them that will end.
///
/// # Errors
/// [`MakeError`]; nothing is left behind then.
pub(super) async fn make(
    wishes: Vec<Wish>,
    ending: &[Rc<Port>],
    there: &[Rc<Port>],
    handed_in: &HashMap<String, Queues>,
) -> Result<Vec<Made>, MakeError> {
    let mut doorbells = Vec::with_capacity(wishes.len());
    for wish in &wishes {
        let before = ending.iter().find(|port| port.has_socket_of(&wish.config));
        let doorbell =
            before.map_or_else(|| Doorbell::open(&wish.config), |port| Ok(port.doorbell.clone()))?;
        doorbells.push((doorbell, before.cloned()));
    }
    let mut made = Vec::with_capacity(wishes.len());
    check(&wishes).await?;
    for (Wish { config, brief, tally, counted }, (doorbell, socket_of)) in wishes.into_iter().zip(doorbells) {
        let tap_of = ending.iter().find(|port| port.has_tap_of(&config)).cloned();
        let (tap, mtu, uso) = match &tap_of {
            Some(port) => (tap_of_another(port, &config, handed_in).await?, port.brief.mtu, port.brief.uso),
            None => new_tap(&config, there, handed_in).await?,
        };
        let tally = tally.map_or_else(|| Tally::new(&brief, &counted).map(Rc::new), Ok)?;
        let brief = Brief { mtu, uso, ..brief };
        made.push(Made { config, doorbell, tap, brief, tally, tap_of, socket_of });
    }
    Ok(made)
}

/// Taps that were there before are touched only when what they shall be in is there.
async fn check(wishes: &[Wish]) -> Result<(), LinkError> {
    let wanted: Vec<_> = wishes.iter().map(|wish| wanted(&wish.config)).collect();
    blocking(move || wanted.iter().try_for_each(link::check)).await
}

/// Other descriptors of a tap.
fn another(tap: &Queues, config: &config::Port, count: u16) -> Result<Queues, MakeError> {
    tap.share(count).map_err(|error| MakeError::Descriptor(config.tap.to_string(), error))
}

/// The tap that a port has until it ends, with as many queues as are wanted now.
async fn tap_of_another(
    port: &Port,
    config: &config::Port,
    handed_in: &HashMap<String, Queues>,
) -> Result<Queues, MakeError> {
    let (name, count) = (config.tap.to_string(), config.queue_pairs);
    let there = port.brief.queue_pairs;
    if there >= count {
        return another(&port.tap, config, count);
    }
    if let Some(all) = handed_in.get(&name) {
        all.check(&name, count)?;
        return another(all, config, count);
    }
    let mut tap = another(&port.tap, config, there)?;
    let netns = wanted(config).netns;
    let extend = move || -> Result<Queues, MakeError> {
        link::in_namespace(netns.as_deref(), || tap.extend(&name, count))??;
        Ok(tap)
    };
    blocking(extend).await
}

/// A tap that no port has, set up, its MTU, and whether it knows UDP segmentation.
async fn new_tap(
    config: &config::Port,
    there: &[Rc<Port>],
    handed_in: &HashMap<String, Queues>,
) -> Result<(Queues, u16, bool), MakeError> {
    let (wanted, count) = (wanted(config), config.queue_pairs);
    let name = wanted.name.clone();
    let handed_in = handed_in.get(&name).map(|tap| another(tap, config, u16::MAX)).transpose()?;
    if let (None, Some(netns)) = (&handed_in, &wanted.netns)
        && let Some(port) = there.iter().find(|p| p.config.netns.is_none() && p.config.tap == config.tap)
    {
        return Err(MakeError::InTheWay { tap: name, vm: port.brief.vm.clone(), netns: netns.clone() });
    }
    blocking(move || {
        let tap = match handed_in {
            Some(tap) => Queues::adopt(tap, &name, count)?,
            None => Queues::attach(&name, count)?,
        };
        let uso = tap::knows_uso(tap.first(), &name)?;
        let mtu = link::configure(&wanted)?.mtu;
        tap::drain(tap.first()); // one that was handed in may have been another VM's
        Ok((tap, mtu, uso))
    })
    .await
}

fn wanted(config: &config::Port) -> Wanted {
    Wanted {
        name: config.tap.to_string(),
        netns: config.netns.as_ref().map(|netns| netns.path().to_path_buf()),
        bridge: config.bridge.clone(),
        no_bridge: false,
        mtu: config.mtu,
    }
}

/// What was altered of sockets and taps that are still in use, and how it was.
#[derive(Debug, Default)]
pub struct Altered(Vec<Was>);

#[derive(Debug)]
enum Was {
    /// A socket was for those whom these settings name.
    Socket(Rc<Listening>, Box<config::Port>),
    /// A tap was set up in this way.
    Link(Wanted),
}

/// Gives sockets and taps that ending ports still have the settings of the ports that begin.
///
/// # Errors
/// [`MakeError`]; everything is as it was then.
pub(super) async fn alter(made: &mut [Made]) -> Result<Altered, MakeError> {
    let mut altered = Altered::default();
    for port in made {
        if let Err(error) = altered.alter(port).await {
            altered.undo().await;
            return Err(error);
        }
    }
    Ok(altered)
}

impl Altered {
    async fn alter(&mut self, made: &mut Made) -> Result<(), MakeError> {
        if let (Some(before), Doorbell::Server(listening)) = (&made.socket_of, &made.doorbell) {
            let access = |port: &config::Port| (port.owner, port.group, port.socket_mode);
            if access(&before.config) != access(&made.config) {
                self.0.push(Was::Socket(Rc::clone(listening), Box::new(before.config.clone())));
                listening.give_access(&made.config)?;
            }
        }
        if let Some(before) = &made.tap_of {
            let (was, wanted) = (&before.config.bridge, wanted(&made.config));
            let left = |old: &Option<String>, new: &Option<String>| old.is_some() && new.is_none();
            self.0.push(Was::Link(Wanted {
                bridge: was.clone(),
                no_bridge: left(&wanted.bridge, was),
                mtu: Some(before.brief.mtu),
                ..wanted.clone()
            }));
            let wanted = Wanted { no_bridge: left(was, &wanted.bridge), ..wanted };
            made.brief.mtu = blocking(move || link::configure(&wanted)).await?.mtu;
        }
        Ok(())
    }

    /// Makes everything as it was.
    pub async fn undo(self) {
        for was in self.0.into_iter().rev() {
            let undone = match was {
                Was::Socket(socket, config) => socket.give_access(&config).map_err(MakeError::from),
                Was::Link(wanted) => {
                    blocking(move || link::configure(&wanted)).await.map(drop).map_err(Into::into)
                }
            };
            if let Err(error) = undone {
                tracing::error!("a change that was not made could not be undone: {error}");
            }
        }
    }
}
