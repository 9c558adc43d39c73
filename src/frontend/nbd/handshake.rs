//! The handshake and option haggling: fixed newstyle. Pure: bytes and answers in, bytes and questions out.
//!
//! Owns: which options are understood, what is negotiated, what goes before TLS and what only within, and the limits on
//! a client that has not chosen a disk.
//! Does not own: sockets and time limits ([`super::connection`]), TLS itself ([`super::tls`]), or which disks there are
//! ([`super::Exports`]).

use super::context::{ContextName, ContextSet, PastStates, Queries};
use super::wire::{
    BLOCK_BYTES_MIN, BLOCK_BYTES_PREFERRED, DESCRIPTION_BYTES_MAX, FLAG_BLOCK_STATUS_PAYLOAD,
    FLAG_CAN_MULTI_CONN, FLAG_FIXED_NEWSTYLE, FLAG_HAS_FLAGS, FLAG_NO_ZEROES, FLAG_READ_ONLY,
    FLAG_SEND_CACHE, FLAG_SEND_DF, FLAG_SEND_FAST_ZERO, FLAG_SEND_FLUSH, FLAG_SEND_FUA, FLAG_SEND_TRIM,
    FLAG_SEND_WRITE_ZEROES, Fields, Headers, INFO_BLOCK_SIZE, INFO_DESCRIPTION, INFO_EXPORT, INFO_NAME,
    INIT_MAGIC, MESSAGE_BYTES_MAX, OPT_ABORT, OPT_EXPORT_NAME, OPT_EXTENDED_HEADERS, OPT_GO, OPT_INFO,
    OPT_LIST, OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT, OPT_STARTTLS, OPT_STRUCTURED_REPLY,
    OPTION_BYTES_MAX, OPTION_LEN, OPTION_MAGIC, OPTIONS_MAX, OptionHeader, PAYLOAD_BYTES_MAX, REP_ACK,
    REP_ERR_EXT_HEADER_REQD, REP_ERR_INVALID, REP_ERR_POLICY, REP_ERR_TLS_REQD, REP_ERR_TOO_BIG,
    REP_ERR_UNKNOWN, REP_ERR_UNSUP, REP_INFO, REP_META_CONTEXT, REP_SERVER, cut, put_option_reply, string,
};
use super::{ExportError, ExportListing};
use crate::geometry::{Access, Geometry};
use bytes::{Buf, BufMut, BytesMut};

/// What the handshake wants next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// More bytes, once what is in [`Handshake::output`] was sent.
    NeedInput,
    /// The disks: answer with [`Handshake::listed`].
    List,
    /// The disk of this name: answer with [`Handshake::opened`].
    Open { name: String },
    /// Past states of the disk of this name: answer with [`Handshake::past_found`].
    Past { name: String, past: PastStates, purpose: Purpose },
    /// TLS begins: send what is in [`Handshake::output`], and once it stands, say so with [`Handshake::secured`].
    StartTls,
    /// Requests follow on the disk that was opened last.
    Transmit(Negotiated),
    /// Over: send what is in [`Handshake::output`], then close. The reason is for a log.
    Close(&'static str),
}

/// What a connection offers and demands of TLS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Security {
    /// There is none.
    Plain,
    Offered,
    /// Nothing is told or served without.
    Required,
    /// It stands.
    Secured,
}

/// What past states are asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// To be named.
    List,
    /// To be compared with: they take the place of those before.
    Select,
}

/// What was agreed on for the requests that follow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Negotiated {
    pub replies: Replies,
    pub headers: Headers,
    /// What the client may ask block status about.
    pub contexts: ContextSet,
}

/// Which replies the client understands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Replies {
    Simple,
    /// In chunks, whatever their headers.
    Structured,
}

/// What the client is told about a disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExportFacts {
    pub name: String,
    pub description: String,
    pub geometry: Geometry,
}

/// One client's handshake.
#[derive(Debug)]
pub struct Handshake {
    state: State,
    /// Bytes for the client, in order.
    output: BytesMut,
    options: u32,
    security: Security,
    style: Style,
    padding: Padding,
    replies: Replies,
    headers: Headers,
    /// For which disk, as the client named it, which contexts are selected.
    selected: Option<(String, Vec<ContextName>)>,
}

#[derive(Debug)]
enum State {
    ClientFlags,
    Header,
    Data(OptionHeader),
    Skip { option: u32, left_bytes: u32 },
    Asked(Question),
    Done(Event),
}

/// An option that waits for an answer about disks.
#[derive(Debug)]
enum Question {
    List,
    ExportName { name: String },
    Info { option: u32, name: String, wanted: Vec<u16> },
    MetaContext { option: u32, name: String, queries: Queries },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Padding {
    Zeroes,
    None,
}

/// What the client says of itself; only fixed newstyle has errors, and so TLS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Style {
    Newstyle,
    FixedNewstyle,
}

impl Handshake {
    /// The greeting is in the output at once.
    pub fn new(security: Security) -> Self {
        let mut output = BytesMut::new();
        output.put_u64(INIT_MAGIC);
        output.put_u64(OPTION_MAGIC);
        output.put_u16(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
        Self {
            state: State::ClientFlags,
            output,
            options: 0,
            security,
            style: Style::Newstyle,
            padding: Padding::Zeroes,
            replies: Replies::Simple,
            headers: Headers::Compact,
            selected: None,
        }
    }

    /// Goes on within TLS, having forgotten what was agreed before it, which may have been said by somebody else.
    pub fn secured(&mut self) {
        if matches!(self.state, State::Done(Event::StartTls)) {
            self.state = State::Header;
            self.security = Security::Secured;
            self.replies = Replies::Simple;
            self.headers = Headers::Compact;
            self.selected = None;
        }
    }

    /// Bytes to be sent; the caller takes them.
    pub fn output(&mut self) -> &mut BytesMut {
        &mut self.output
    }

    /// Goes on with what is in `input`, taking what it uses. Bytes after the handshake stay there. Never wants more
    /// than [`OPTION_BYTES_MAX`] in it at a time.
    pub fn next(&mut self, input: &mut BytesMut) -> Event {
        loop {
            let state = std::mem::replace(&mut self.state, State::Header);
            let step = match state {
                State::ClientFlags => self.client_flags(input),
                State::Header => self.header(input),
                State::Data(header) => self.data(header, input),
                State::Skip { option, left_bytes } => self.skip(option, left_bytes, input),
                State::Asked(question) => Err((question.event(), State::Asked(question))),
                State::Done(event) => Err((event.clone(), State::Done(event))),
            };
            match step {
                Ok(state) => self.state = state,
                Err((event, state)) => {
                    self.state = state;
                    return event;
                }
            }
        }
    }

    /// Answers [`Event::List`].
    pub fn listed(&mut self, exports: &[ExportListing]) {
        if !matches!(self.state, State::Asked(Question::List)) {
            return;
        }
        for export in exports {
            let description = cut(&export.description, DESCRIPTION_BYTES_MAX);
            let mut data = Vec::with_capacity(4 + export.name.len() + description.len());
            put_string(&mut data, &export.name);
            data.put_slice(description.as_bytes());
            put_option_reply(&mut self.output, OPT_LIST, REP_SERVER, &data);
        }
        put_option_reply(&mut self.output, OPT_LIST, REP_ACK, &[]);
        self.state = State::Header;
    }

    /// Answers [`Event::Open`].
    pub fn opened(&mut self, result: Result<&ExportFacts, &ExportError>) {
        let question = match std::mem::replace(&mut self.state, State::Header) {
            State::Asked(question) => question,
            other => {
                self.state = other;
                return;
            }
        };
        self.state = match (question, result) {
            (question @ (Question::List | Question::MetaContext { .. }), _) => State::Asked(question),
            (Question::ExportName { .. }, Err(_)) => close("the client asked for a disk that is not served"),
            (Question::Info { option, name, .. }, Err(error)) => {
                self.unknown(option, &name, error);
                State::Header
            }
            (Question::ExportName { name }, Ok(facts)) => {
                self.output.put_u64(facts.geometry.size_bytes);
                self.output.put_u16(self.transmission_flags(&name, facts));
                if self.padding == Padding::Zeroes {
                    self.output.put_bytes(0, 124);
                }
                self.transmit(&name)
            }
            (Question::Info { option, name, wanted }, Ok(facts)) => {
                self.info(option, &name, facts, &wanted);
                if option == OPT_GO { self.transmit(&name) } else { State::Header }
            }
        };
    }

    /// Answers [`Event::Past`] with the names of the past states that there are.
    pub fn past_found(&mut self, found: Result<&[String], &ExportError>) {
        match std::mem::replace(&mut self.state, State::Header) {
            State::Asked(Question::MetaContext { option, name, queries }) => match found {
                Ok(found) => {
                    self.state = self.meta_context(option, name, queries.contexts(found));
                }
                Err(error) => self.unknown(option, &name, error),
            },
            other => self.state = other,
        }
    }

    /// The contexts that were selected for the disk that is transmitted, in the order of their ids.
    pub fn contexts(&self) -> &[ContextName] {
        self.selected.as_ref().map_or(&[], |(_, contexts)| contexts)
    }

    fn meta_context(&mut self, option: u32, name: String, contexts: Vec<ContextName>) -> State {
        let set = option == OPT_SET_META_CONTEXT;
        for (id, context) in (1..).zip(&contexts) {
            let mut data = Vec::new();
            data.put_u32(if set { id } else { 0 });
            data.put_slice(context.text().as_bytes());
            put_option_reply(&mut self.output, option, REP_META_CONTEXT, &data);
        }
        if set && !contexts.is_empty() {
            self.selected = Some((name, contexts));
        }
        put_option_reply(&mut self.output, option, REP_ACK, &[]);
        State::Header
    }

    fn client_flags(&mut self, input: &mut BytesMut) -> Step {
        if input.len() < 4 {
            return Err((Event::NeedInput, State::ClientFlags));
        }
        let flags = input.get_u32();
        let known = u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
        if flags & !known != 0 {
            return Ok(close("the client set flags that were not offered"));
        }
        if flags & u32::from(FLAG_FIXED_NEWSTYLE) != 0 {
            self.style = Style::FixedNewstyle;
        }
        if flags & u32::from(FLAG_NO_ZEROES) != 0 {
            self.padding = Padding::None;
        }
        Ok(State::Header)
    }

    fn header(&mut self, input: &mut BytesMut) -> Step {
        let Some(bytes) = input.first_chunk::<OPTION_LEN>() else {
            return Err((Event::NeedInput, State::Header));
        };
        let Some(header) = OptionHeader::parse(bytes) else {
            return Ok(close("an option began with the wrong magic number"));
        };
        input.advance(OPTION_LEN);
        self.options += 1;
        if self.options > OPTIONS_MAX {
            return Ok(close("the client sent too many options"));
        }
        if header.len_bytes <= OPTION_BYTES_MAX {
            return Ok(State::Data(header));
        }
        if header.option == OPT_EXPORT_NAME {
            return Ok(close("the client sent a name that is too long"));
        }
        Ok(State::Skip { option: header.option, left_bytes: header.len_bytes })
    }

    fn skip(&mut self, option: u32, left_bytes: u32, input: &mut BytesMut) -> Step {
        let skipped = u32::try_from(input.len()).unwrap_or(u32::MAX).min(left_bytes);
        input.advance(skipped as usize);
        let left_bytes = left_bytes - skipped;
        if left_bytes > 0 {
            return Err((Event::NeedInput, State::Skip { option, left_bytes }));
        }
        Ok(match self.security {
            Security::Required => self.refuse(option, REP_ERR_TLS_REQD, TLS_REQUIRED),
            Security::Plain | Security::Offered | Security::Secured => {
                self.refuse(option, REP_ERR_TOO_BIG, "the option is too long")
            }
        })
    }

    fn data(&mut self, header: OptionHeader, input: &mut BytesMut) -> Step {
        let len = header.len_bytes as usize;
        if input.len() < len {
            return Err((Event::NeedInput, State::Data(header)));
        }
        let data = input.split_to(len);
        if header.option == OPT_STARTTLS {
            return Ok(self.start_tls(&data, input));
        }
        Ok(self.option(header.option, &data))
    }

    fn start_tls(&mut self, data: &[u8], input: &BytesMut) -> State {
        match self.security {
            Security::Plain => self.refuse(OPT_STARTTLS, REP_ERR_POLICY, "TLS is not set up on this server"),
            Security::Secured => self.refuse(OPT_STARTTLS, REP_ERR_INVALID, "TLS is in use already"),
            Security::Offered | Security::Required => {
                if !data.is_empty() {
                    return self.refuse(OPT_STARTTLS, REP_ERR_INVALID, "this option takes no data");
                }
                if self.style == Style::Newstyle {
                    return self.refuse(OPT_STARTTLS, REP_ERR_INVALID, "TLS needs fixed newstyle");
                }
                // Whatever came behind it was not said within TLS, and must not be taken for that later.
                if !input.is_empty() {
                    return close("bytes came between the start of TLS and TLS");
                }
                put_option_reply(&mut self.output, OPT_STARTTLS, REP_ACK, &[]);
                State::Done(Event::StartTls)
            }
        }
    }

    fn option(&mut self, option: u32, data: &[u8]) -> State {
        if self.security == Security::Required && option != OPT_ABORT {
            return match option {
                OPT_EXPORT_NAME => close("the client asked for a disk without TLS"),
                _ => self.refuse(option, REP_ERR_TLS_REQD, TLS_REQUIRED),
            };
        }
        match option {
            OPT_EXPORT_NAME if self.headers == Headers::Extended => {
                close("the client asked for a disk in a way that extended headers exclude")
            }
            OPT_EXPORT_NAME => match string(data) {
                Some(name) => State::Asked(Question::ExportName { name: name.to_owned() }),
                None => close("the client sent a malformed name"),
            },
            OPT_ABORT => {
                put_option_reply(&mut self.output, option, REP_ACK, &[]);
                close("the client gave up the handshake")
            }
            OPT_LIST if data.is_empty() => State::Asked(Question::List),
            OPT_STRUCTURED_REPLY if data.is_empty() && self.headers == Headers::Extended => {
                self.refuse(option, REP_ERR_EXT_HEADER_REQD, "extended headers are in use and stay")
            }
            OPT_EXTENDED_HEADERS if data.is_empty() => {
                self.headers = Headers::Extended;
                self.replies = Replies::Structured;
                put_option_reply(&mut self.output, option, REP_ACK, &[]);
                State::Header
            }
            OPT_STRUCTURED_REPLY if data.is_empty() => {
                self.replies = Replies::Structured;
                put_option_reply(&mut self.output, option, REP_ACK, &[]);
                State::Header
            }
            OPT_LIST | OPT_STRUCTURED_REPLY | OPT_EXTENDED_HEADERS => {
                self.refuse(option, REP_ERR_INVALID, "this option takes no data")
            }
            OPT_INFO | OPT_GO => match parse_info(data) {
                Some((name, wanted)) => State::Asked(Question::Info { option, name, wanted }),
                None => self.refuse(option, REP_ERR_INVALID, "the option is malformed"),
            },
            OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => {
                if option == OPT_SET_META_CONTEXT {
                    // What was selected before is gone even if this attempt fails.
                    self.selected = None;
                }
                if self.replies == Replies::Simple {
                    return self.refuse(
                        option,
                        REP_ERR_INVALID,
                        "negotiate structured replies or extended headers first",
                    );
                }
                match Queries::parse(option, data) {
                    Some((_, queries)) if queries.are_too_many() => {
                        self.refuse(option, REP_ERR_TOO_BIG, "too many metadata contexts")
                    }
                    Some((name, queries)) => State::Asked(Question::MetaContext { option, name, queries }),
                    None => self.refuse(option, REP_ERR_INVALID, "the option is malformed"),
                }
            }
            _ => self.refuse(option, REP_ERR_UNSUP, "this server does not know the option"),
        }
    }

    fn refuse(&mut self, option: u32, reply: u32, message: &str) -> State {
        put_option_reply(&mut self.output, option, reply, message.as_bytes());
        State::Header
    }

    fn unknown(&mut self, option: u32, name: &str, error: &ExportError) {
        let message = if name.is_empty() {
            format!("no default disk: {error}; ask for one by name")
        } else {
            format!("\"{name}\": {error}")
        };
        self.refuse(option, REP_ERR_UNKNOWN, cut(&message, MESSAGE_BYTES_MAX));
    }

    fn info(&mut self, option: u32, name: &str, facts: &ExportFacts, wanted: &[u16]) {
        let mut data = Vec::new();
        data.put_u16(INFO_EXPORT);
        data.put_u64(facts.geometry.size_bytes);
        data.put_u16(self.transmission_flags(name, facts));
        put_option_reply(&mut self.output, option, REP_INFO, &data);
        for kind in [INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE] {
            if !wanted.contains(&kind) {
                continue;
            }
            data.clear();
            data.put_u16(kind);
            match kind {
                INFO_NAME => data.put_slice(facts.name.as_bytes()),
                INFO_DESCRIPTION => {
                    data.put_slice(cut(&facts.description, DESCRIPTION_BYTES_MAX).as_bytes());
                }
                _ => {
                    data.put_u32(BLOCK_BYTES_MIN);
                    data.put_u32(preferred_block_bytes(&facts.geometry));
                    data.put_u32(PAYLOAD_BYTES_MAX);
                }
            }
            put_option_reply(&mut self.output, option, REP_INFO, &data);
        }
        put_option_reply(&mut self.output, option, REP_ACK, &[]);
    }

    fn transmit(&mut self, name: &str) -> State {
        self.selected.take_if(|(selected_for, _)| selected_for != name);
        let contexts = ContextSet::first(self.contexts().len());
        let (replies, headers) = (self.replies, self.headers);
        State::Done(Event::Transmit(Negotiated { replies, headers, contexts }))
    }

    /// Each flag is a promise about the engine: a flush covers all connections, zeroing whole sectors never waits.
    fn transmission_flags(&self, name: &str, facts: &ExportFacts) -> u16 {
        let always = FLAG_HAS_FLAGS | FLAG_SEND_FLUSH | FLAG_CAN_MULTI_CONN | FLAG_SEND_CACHE;
        let access = match facts.geometry.access {
            Access::ReadOnly => FLAG_READ_ONLY,
            Access::ReadWrite => {
                FLAG_SEND_FUA | FLAG_SEND_TRIM | FLAG_SEND_WRITE_ZEROES | FLAG_SEND_FAST_ZERO
            }
        };
        let replies = match self.replies {
            Replies::Simple => 0,
            Replies::Structured => FLAG_SEND_DF,
        };
        let selected = self.selected.as_ref().is_some_and(|(selected_for, _)| selected_for == name);
        let filter = match self.headers {
            Headers::Extended if selected => FLAG_BLOCK_STATUS_PAYLOAD,
            Headers::Extended | Headers::Compact => 0,
        };
        always | access | replies | filter
    }
}

/// The state to go on with, or what is wanted before and the state to wait in.
type Step = Result<State, (Event, State)>;

impl Question {
    fn event(&self) -> Event {
        match self {
            Self::List => Event::List,
            Self::ExportName { name } | Self::Info { name, .. } => Event::Open { name: name.clone() },
            Self::MetaContext { option, name, queries } => {
                let purpose = if *option == OPT_SET_META_CONTEXT { Purpose::Select } else { Purpose::List };
                Event::Past { name: name.clone(), past: queries.past.clone(), purpose }
            }
        }
    }
}

const TLS_REQUIRED: &str = "this server wants TLS first";

fn close(reason: &'static str) -> State {
    State::Done(Event::Close(reason))
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    let text = cut(text, super::wire::STRING_BYTES_MAX);
    out.put_u32(u32::try_from(text.len()).expect("a cut string is short"));
    out.put_slice(text.as_bytes());
}

/// The protocol wants a power of two between 512 and what fits the largest payload.
fn preferred_block_bytes(geometry: &Geometry) -> u32 {
    let physical = geometry.physical_block_bytes;
    if physical.is_power_of_two() && (BLOCK_BYTES_PREFERRED..=PAYLOAD_BYTES_MAX).contains(&physical) {
        physical
    } else {
        BLOCK_BYTES_PREFERRED
    }
}

fn parse_info(data: &[u8]) -> Option<(String, Vec<u16>)> {
    let mut fields = Fields(data);
    let name = fields.string()?.to_owned();
    let count = fields.u16()?;
    let wanted = (0..count).map(|_| fields.u16()).collect::<Option<Vec<_>>>()?;
    fields.is_empty().then_some((name, wanted))
}

#[cfg(test)]
#[path = "handshake_tests.rs"]
mod tests;
