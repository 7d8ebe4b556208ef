//! The tap as a network interface: its MTU, its bridge, its network namespace, up and down.
//!
//! A tap is made in our own network namespace and moved; what is done to it there is done by a thread that
//! enters that namespace and ends.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
};

use futures_util::TryStreamExt;
use rtnetlink::{
    Handle, LinkMessageBuilder, LinkUnspec,
    packet_route::link::{LinkAttribute, LinkFlags, LinkMessage},
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// The MTU of an interface that says none, in bytes.
const DEFAULT_MTU: u32 = 1500;

/// What is wanted of an interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Its name.
    pub name: String,
    /// The file of the network namespace that it is to be in; ours if there is none.
    pub netns: Option<PathBuf>,
    /// The bridge that it is to be a port of.
    pub bridge: Option<String>,
    /// Take it out of the bridge that it is a port of.
    pub no_bridge: bool,
    /// Its MTU in bytes; else it keeps what it has.
    pub mtu: Option<u16>,
}

/// What was found when all was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its MTU in bytes.
    pub mtu: u16,
}

/// Why an interface is not as it is wanted.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The network namespace cannot be opened or entered.
    #[error("network namespace {0}: {1}")]
    Namespace(PathBuf, io::Error),
    /// A request to the kernel failed.
    #[error("{interface}: cannot {what}: {why}")]
    Refused {
        /// The interface.
        interface: String,
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        why: String,
    },
}

/// Finds out whether the network namespace and the bridge are there.
///
/// # Errors
/// [`LinkError`] says which is not.
pub fn check(wanted: &Wanted) -> Result<(), LinkError> {
    let Some(bridge) = &wanted.bridge else {
        return wanted.netns.as_deref().map_or(Ok(()), |path| open_namespace(path).map(drop));
    };
    inside(wanted.netns.as_deref(), async |handle| get(&handle, bridge).await.map(drop))
}

/// An interface as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// It is switched on.
    pub is_up: bool,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// The bridge that it is a port of, and that one's MTU in bytes.
    pub bridge: Option<(String, u32)>,
}

/// Looks at an interface.
///
/// # Errors
/// [`LinkError`] where there is none of that name.
pub fn look(name: &str, netns: Option<&Path>) -> Result<Link, LinkError> {
    inside(netns, async |handle| {
        let link = get(&handle, name).await?;
        let controller = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Controller(index) => Some(*index),
            _ => None,
        });
        let bridge = match controller {
            Some(index) => by_index(&handle, index).await.map(|bridge| (name_of(&bridge), mtu_of(&bridge))),
            None => None,
        };
        Ok(Link { is_up: link.header.flags.contains(LinkFlags::Up), mtu: mtu_of(&link), bridge })
    })
}

async fn by_index(handle: &Handle, index: u32) -> Option<LinkMessage> {
    let mut links = std::pin::pin!(handle.link().get().match_index(index).execute());
    links.try_next().await.ok().flatten()
}

fn name_of(link: &LinkMessage) -> String {
    let name = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    });
    name.unwrap_or_default()
}

fn mtu_of(link: &LinkMessage) -> u32 {
    let mtu = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    });
    mtu.unwrap_or(DEFAULT_MTU)
}

/// Moves, sets up and switches on.
///
/// # Errors
/// [`LinkError`] says which step.
pub fn configure(wanted: &Wanted) -> Result<Found, LinkError> {
    if let Some(path) = &wanted.netns {
        let file = open_namespace(path)?;
        inside(None, async |handle| {
            if !exists(&handle, &wanted.name).await {
                return Ok(()); // it was handed in, and is there already
            }
            let moved = unspec(&wanted.name).setns_by_fd(file.as_raw_fd()).build();
            set(&handle, moved, wanted, "move it to its network namespace").await
        })?;
    }
    inside(wanted.netns.as_deref(), async |handle| {
        if let Some(bridge) = &wanted.bridge {
            let index = get(&handle, bridge).await?.header.index;
            set(&handle, unspec(&wanted.name).controller(index).build(), wanted, "add it to its bridge")
                .await?;
        }
        if wanted.no_bridge {
            let none = unspec(&wanted.name).nocontroller().build();
            set(&handle, none, wanted, "take it out of its bridge").await?;
        }
        if let Some(mtu) = wanted.mtu {
            set(&handle, unspec(&wanted.name).mtu(mtu.into()).build(), wanted, "set its MTU").await?;
        }
        set(&handle, unspec(&wanted.name).up().build(), wanted, "set it up").await?;
        let link = get(&handle, &wanted.name).await?;
        Ok(Found { mtu: u16::try_from(mtu_of(&link)).unwrap_or(u16::MAX) })
    })
}

/// Runs `work` in a network namespace: on a thread of its own, since a namespace is a thread's.
///
/// # Errors
/// [`LinkError::Namespace`].
pub fn in_namespace<T: Send>(netns: Option<&Path>, work: impl FnOnce() -> T + Send) -> Result<T, LinkError> {
    let namespace = netns.map(|path| open_namespace(path).map(|file| (path, file))).transpose()?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            if let Some((path, file)) = namespace {
                move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                    .map_err(|e| LinkError::Namespace(path.into(), e.into()))?;
            }
            Ok(work())
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Runs `work` with a netlink connection in a network namespace.
fn inside<T: Send>(
    netns: Option<&Path>,
    work: impl AsyncFnOnce(Handle) -> Result<T, LinkError> + Send,
) -> Result<T, LinkError> {
    in_namespace(netns, || {
        let netlink = |e: io::Error| LinkError::Refused {
            interface: "netlink".into(),
            what: "connect",
            why: e.to_string(),
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(netlink)?;
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().map_err(netlink)?;
            let driver = tokio::spawn(connection);
            let done = work(handle).await;
            driver.abort();
            done
        })
    })?
}

fn open_namespace(path: &Path) -> Result<File, LinkError> {
    File::open(path).map_err(|e| LinkError::Namespace(path.into(), e))
}

fn unspec(name: &str) -> LinkMessageBuilder<LinkUnspec> {
    LinkUnspec::new_with_name(name)
}

async fn exists(handle: &Handle, name: &str) -> bool {
    get(handle, name).await.is_ok()
}

async fn get(handle: &Handle, name: &str) -> Result<LinkMessage, LinkError> {
    let refused = |why: String| LinkError::Refused { interface: name.into(), what: "find it", why };
    let mut links = std::pin::pin!(handle.link().get().match_name(name.to_string()).execute());
    match links.try_next().await {
        Ok(Some(link)) => Ok(link),
        Ok(None) => Err(refused("there is none of that name".into())),
        Err(e) => Err(refused(reason(&e))),
    }
}

async fn set(
    handle: &Handle,
    message: LinkMessage,
    wanted: &Wanted,
    what: &'static str,
) -> Result<(), LinkError> {
    handle.link().set(message).execute().await.map_err(|e| LinkError::Refused {
        interface: wanted.name.clone(),
        what,
        why: reason(&e),
    })
}

/// What the kernel said, without the library's own words.
fn reason(error: &rtnetlink::Error) -> String {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io().to_string(),
        other => other.to_string(),
    }
}
