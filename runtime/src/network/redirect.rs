//! Ties an interface to a tap by traffic control: whatever comes in at one goes out at the other,
//! before the host's own network stack sees it. So the host answers nothing that is meant for the
//! guest, though it keeps the interface's addresses.

use std::{collections::BTreeSet, ops::RangeInclusive};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkFlags, LinkMessage},
    tc::{
        TcAction, TcActionAttribute, TcActionGeneric, TcActionMirror, TcActionMirrorOption,
        TcActionOption, TcActionType, TcAttribute, TcFilterU32, TcFilterU32Option, TcHandle,
        TcMessage, TcMirror, TcMirrorActionType, TcOption, TcU32Key, TcU32Selector,
        TcU32SelectorFlags,
    },
};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::{
    NetworkError,
    netlink::{Netlink, NetlinkError},
    resolver::FIRST_PORT,
};

/// Our filters' preference: nobody's default, and after what others have set, so that a policy of
/// theirs can drop a packet first.
const PREFERENCE: u16 = 47_700;
/// Of the filters before them, by which answers reach a name server in the namespace.
const ADMITTING: RangeInclusive<u16> = PREFERENCE - 2..=PREFERENCE - 1;
/// `ETH_P_ALL` in the byte order of the network (linux/if_ether.h).
const EVERY_PROTOCOL: u16 = 0x0003u16.to_be();
/// `ETH_P_ARP` and `ETH_P_IP`.
const ARP: u16 = 0x0806u16.to_be();
const IPV4: u16 = 0x0800u16.to_be();

/// What was done to an interface of the manager's, to be undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tie {
    /// The interface's index.
    pub index: u32,
    /// It had no queueing discipline for what comes in, so it was given one.
    pub discipline: bool,
    /// It was told to pass on all multicast.
    pub all_multicast: bool,
}

/// Indexes of the interfaces that have a queueing discipline for what comes in.
pub(super) fn disciplines(netlink: &mut Netlink) -> Result<BTreeSet<u32>, NetlinkError> {
    let request = RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default());
    let found = netlink.dump(&request)?.into_iter();
    Ok(found
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewQueueDiscipline(message)
                if message.header.parent == TcHandle::INGRESS =>
            {
                u32::try_from(message.header.index).ok()
            }
            _ => None,
        })
        .collect())
}

/// Whether an interface's discipline holds a redirection of ours and nothing else: that of a monitor
/// that was killed, since whoever asks holds the namespace.
pub(super) fn is_abandoned(netlink: &mut Netlink, index: u32) -> Result<bool, NetlinkError> {
    let mut ours = false;
    for minor in [TcHandle::MIN_INGRESS, TcHandle::MIN_EGRESS] {
        let mut request = message(index);
        request.header.parent = TcHandle {
            major: u16::MAX,
            minor,
        };
        for found in netlink.dump(&RouteNetlinkMessage::GetTrafficFilter(request))? {
            if let RouteNetlinkMessage::NewTrafficFilter(found) = found {
                let preference = TcHandle::from(found.header.info).major;
                let known = preference == PREFERENCE || ADMITTING.contains(&preference);
                if minor != TcHandle::MIN_INGRESS || !known {
                    return Ok(false);
                }
                ours = true;
            }
        }
    }
    Ok(ours)
}

impl Tie {
    /// Ties the interface and the tap together, or leaves the interface as it was.
    pub(super) fn make(self, netlink: &mut Netlink, tap: u32) -> Result<(), NetworkError> {
        let made = self.try_make(netlink, tap);
        if made.is_err() {
            // What of it was not made cannot be undone: no reason to say more.
            let _ = self.remove_filter(netlink);
            let _ = self.restore(netlink);
        }
        made
    }

    fn try_make(self, netlink: &mut Netlink, tap: u32) -> Result<(), NetworkError> {
        let failed = |what, index: u32| {
            move |source| NetworkError::Change {
                what,
                interface: index.to_string(),
                source,
            }
        };
        // Of a device before this one, or of a container whose monitor was killed.
        if self.remove_filter(netlink)? {
            tracing::debug!("interface {} had a redirection", self.index);
        }
        for (from, to) in [(self.index, tap), (tap, self.index)] {
            let request = RouteNetlinkMessage::NewQueueDiscipline(discipline(from));
            match netlink.change(request, NLM_F_CREATE | NLM_F_EXCL) {
                Err(error) if error.errno() == Some(Errno::EXIST) => {}
                made => made.map_err(failed("make a queueing discipline for interface", from))?,
            }
            netlink
                .change(
                    RouteNetlinkMessage::NewTrafficFilter(redirection(from, to)),
                    NLM_F_CREATE | NLM_F_EXCL,
                )
                .map_err(failed("redirect what comes in at interface", from))?;
        }
        if self.all_multicast {
            set_all_multicast(netlink, self.index, true)
                .map_err(failed("receive all multicast on interface", self.index))?;
        }
        Ok(())
    }

    /// Makes the interface what it was, if that has not been done. An interface that is gone needs
    /// nothing.
    pub(super) fn undo(self, netlink: &mut Netlink) -> Result<(), NetworkError> {
        if !self.remove_filter(netlink)? {
            return Ok(());
        }
        self.restore(netlink)
            .map_err(|source| NetworkError::Change {
                what: "restore interface",
                interface: self.index.to_string(),
                source,
            })
    }

    fn restore(self, netlink: &mut Netlink) -> Result<(), NetlinkError> {
        if self.discipline {
            let mut message = discipline(self.index);
            message.attributes.clear();
            netlink.change(RouteNetlinkMessage::DelQueueDiscipline(message), 0)?;
        }
        if self.all_multicast {
            set_all_multicast(netlink, self.index, false)?;
        }
        Ok(())
    }

    /// Lets answers to a name server in the namespace come in, which asks from ports of its own
    /// (`resolver`): those of name servers, and for the way to them, those of ARP, which the guest hears, too.
    pub(super) fn admit_answers(self, netlink: &mut Netlink, tap: u32) -> Result<(), NetworkError> {
        let mut copy = mirror(tap, TcMirrorActionType::EgressMirror);
        copy.generic.action = TcActionType::Ok;
        let mut filters = vec![filter(
            self.index,
            (*ADMITTING.start(), ARP),
            // RFC 826: an operation 2 is a reply.
            &[key(4, 0x0000_ffff, 2)],
            Some(copy),
        )];
        for protocol in [6, 17] {
            let keys = [
                // RFC 791: a header without options, the first or only fragment, TCP or UDP.
                key(0, 0x0f00_0000, 0x0500_0000),
                key(4, 0x0000_1fff, 0),
                key(8, 0x00ff_0000, protocol << 16),
                // From port 53 to one of the name server's.
                key(
                    20,
                    0xffff_0000 | u32::from(FIRST_PORT),
                    53 << 16 | u32::from(FIRST_PORT),
                ),
            ];
            let place = (*ADMITTING.end(), IPV4);
            filters.push(filter(self.index, place, &keys, None));
        }
        for filter in filters {
            let request = RouteNetlinkMessage::NewTrafficFilter(filter);
            netlink
                .change(request, NLM_F_CREATE | NLM_F_EXCL)
                .map_err(|source| NetworkError::Change {
                    what: "let answers of name servers in at interface",
                    interface: self.index.to_string(),
                    source,
                })?;
        }
        Ok(())
    }

    /// Whether there was one that redirects.
    fn remove_filter(self, netlink: &mut Netlink) -> Result<bool, NetworkError> {
        let redirected = self.remove(netlink, (PREFERENCE, EVERY_PROTOCOL))?;
        if redirected {
            for place in ADMITTING.zip([ARP, IPV4]) {
                self.remove(netlink, place)?;
            }
        }
        Ok(redirected)
    }

    /// Whether there was one.
    fn remove(self, netlink: &mut Netlink, place: (u16, u16)) -> Result<bool, NetworkError> {
        let request = RouteNetlinkMessage::DelTrafficFilter(at_ingress(self.index, place));
        match netlink.change(request, 0) {
            Ok(()) => Ok(true),
            Err(error)
                if matches!(
                    error.errno(),
                    // No such filter, no such discipline, no such interface.
                    Some(Errno::NOENT | Errno::INVAL | Errno::NODEV)
                ) =>
            {
                Ok(false)
            }
            Err(source) => Err(NetworkError::Change {
                what: "remove the redirection of interface",
                interface: self.index.to_string(),
                source,
            }),
        }
    }
}

fn set_all_multicast(netlink: &mut Netlink, index: u32, on: bool) -> Result<(), NetlinkError> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.change_mask = LinkFlags::Allmulti;
    if on {
        message.header.flags = LinkFlags::Allmulti;
    }
    netlink.change(RouteNetlinkMessage::SetLink(message), 0)
}

fn message(index: u32) -> TcMessage {
    // Indexes are positive numbers of an `int`.
    TcMessage::with_index(i32::try_from(index).unwrap_or_default())
}

fn discipline(index: u32) -> TcMessage {
    let mut message = message(index);
    message.header.parent = TcHandle::CLSACT;
    message.header.handle = TcHandle {
        major: u16::MAX,
        minor: 0,
    };
    message
        .attributes
        .push(TcAttribute::Kind("clsact".to_owned()));
    message
}

/// Where filters of a preference and a protocol are.
fn at_ingress(index: u32, (preference, protocol): (u16, u16)) -> TcMessage {
    let mut message = message(index);
    message.header.parent = TcHandle {
        major: u16::MAX,
        minor: TcHandle::MIN_INGRESS,
    };
    message.header.info = u32::from(TcHandle {
        major: preference,
        minor: protocol,
    });
    message
}

/// All that comes in at one interface goes out at another: a key that every packet has.
fn redirection(from: u32, to: u32) -> TcMessage {
    let mut redirect = mirror(to, TcMirrorActionType::EgressRedir);
    redirect.generic.action = TcActionType::Stolen;
    let place = (PREFERENCE, EVERY_PROTOCOL);
    filter(from, place, &[TcU32Key::default()], Some(redirect))
}

fn mirror(to: u32, how: TcMirrorActionType) -> TcMirror {
    let mut mirror = TcMirror::default();
    mirror.generic = TcActionGeneric::default();
    mirror.eaction = how;
    mirror.ifindex = to;
    mirror
}

/// Bits of a packet, four bytes from this offset behind its network header on.
fn key(offset: i32, mask: u32, value: u32) -> TcU32Key {
    let mut key = TcU32Key::default();
    key.off = offset;
    key.mask = mask;
    key.val = value;
    key
}

/// Packets that have all the keys: to the host's own network stack, unless there is an action. The
/// classifier u32: more kernels have it than `matchall`.
fn filter(index: u32, place: (u16, u16), keys: &[TcU32Key], action: Option<TcMirror>) -> TcMessage {
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.nkeys = u8::try_from(keys.len()).unwrap_or(u8::MAX);
    selector.keys = keys.to_vec();
    let mut options = vec![TcOption::U32(TcFilterU32Option::Selector(selector))];
    if let Some(mirror) = action {
        let mut action = TcAction::default();
        action.attributes = vec![
            TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
            TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(
                mirror,
            ))]),
        ];
        options.push(TcOption::U32(TcFilterU32Option::Action(vec![action])));
    } else {
        // A class of nobody's: a match without one and without an action is none.
        options.push(TcOption::U32(TcFilterU32Option::ClassId(TcHandle {
            major: 1,
            minor: 1,
        })));
    }
    let mut message = at_ingress(index, place);
    message.attributes = vec![
        TcAttribute::Kind(TcFilterU32::KIND.to_owned()),
        TcAttribute::Options(options),
    ];
    message
}
