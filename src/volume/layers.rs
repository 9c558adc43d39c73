//! The layers of a volume at one moment: the active epoch, the frozen ones, the base map.
//!
//! Owns: which layer a sector is read from.
//! Does not own: how layers come and go ([`crate::volume::destage`]).

use crate::geometry::{ByteRange, SECTOR_BYTES, SECTORS_PER_WORD};
use crate::volume::base::BaseMap;
use crate::volume::epoch::Epoch;
use std::sync::Arc;

/// One snapshot of a volume's layers: a reader takes it once, after its request came, and looks at nothing else.
#[derive(Clone)]
pub struct Layers {
    pub active: Arc<Epoch>,
    /// Oldest first.
    pub frozen: Vec<Arc<Epoch>>,
    pub base: Arc<BaseMap>,
}

/// Where a stretch of sectors is read from.
pub enum Where<'a> {
    /// From this epoch's file.
    Epoch(&'a Arc<Epoch>),
    /// It is zero by an epoch's record.
    Zero,
    /// No epoch says anything of it.
    Below,
}

impl Layers {
    /// All epochs, newest first.
    pub fn epochs(&self) -> impl Iterator<Item = &Arc<Epoch>> {
        std::iter::once(&self.active).chain(self.frozen.iter().rev())
    }

    /// Cuts `range`, whole sectors, into stretches by where they are read from, in order.
    pub fn resolve<'a>(&'a self, range: ByteRange, visit: impl FnMut(ByteRange, Where<'a>)) {
        let epochs: smallvec::SmallVec<[&Arc<Epoch>; 4]> = self.epochs().collect();
        resolve(&epochs, range, visit);
    }
}

/// As [`Layers::resolve`], over `epochs`, newest first.
pub fn resolve<'a>(epochs: &[&'a Arc<Epoch>], range: ByteRange, mut visit: impl FnMut(ByteRange, Where<'a>)) {
    // Which layer the stretch being gathered is from: an epoch's index, or one of the two below.
    const ZERO: usize = usize::MAX - 1;
    const BELOW: usize = usize::MAX;
    let mut open: Option<(u64, usize)> = None;
    let mut emit = |from: u64, to: u64, source: usize| {
        let place = match source {
            ZERO => Where::Zero,
            BELOW => Where::Below,
            index => Where::Epoch(epochs[index]),
        };
        visit(ByteRange::new(from * SECTOR_BYTES, (to - from) * SECTOR_BYTES), place);
    };
    let mut gather = |sector: u64, source: usize| match open {
        Some((_, same)) if same == source => {}
        Some((from, other)) => {
            emit(from, sector, other);
            open = Some((sector, source));
        }
        None => open = Some((sector, source)),
    };
    let (mut sector, end) = (range.start() / SECTOR_BYTES, range.end() / SECTOR_BYTES);
    while sector < end {
        let from = sector % SECTORS_PER_WORD;
        let count = (SECTORS_PER_WORD - from).min(end - sector);
        let wanted = (u32::MAX >> (SECTORS_PER_WORD - count)) << from;
        // What each layer claims of the sectors that no newer one has.
        let mut claims: smallvec::SmallVec<[(u32, usize); 6]> = smallvec::SmallVec::new();
        let mut left = wanted;
        for (index, epoch) in epochs.iter().enumerate() {
            if left == 0 {
                break;
            }
            let says = epoch.map().says(sector);
            for (mask, source) in [(says.written & left, index), (says.zeroed & left, ZERO)] {
                if mask != 0 {
                    claims.push((mask, source));
                    left &= !mask;
                }
            }
        }
        if left != 0 {
            claims.push((left, BELOW));
        }
        if let [(_, only)] = claims.as_slice() {
            gather(sector, *only);
        } else {
            for at in from..from + count {
                let source =
                    claims.iter().find(|(mask, _)| mask >> at & 1 == 1).map_or(BELOW, |claim| claim.1);
                gather(sector - from + at, source);
            }
        }
        sector += count;
    }
    if let Some((from, source)) = open {
        emit(from, end, source);
    }
}
