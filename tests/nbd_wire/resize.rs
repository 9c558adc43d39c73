//! A disk that changes its size under its clients. NBD has no word for that: a client that is connected goes on with the
//! size that it was told when it came, and learns another one only by asking anew. What the server answers follows the
//! size of the moment.

use crate::client::{Ask, MODES, Mode};
use crate::world::{DISK_BYTES, MIB, World};
use blockhouse::frontend::nbd::wire::{CMD_BLOCK_STATUS, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES};

#[tokio::test]
async fn requests_in_what_a_disk_has_grown_by_are_served_at_once() {
    for mode in MODES {
        let world = World::start().await;
        world.disk.show(MIB);
        let mut client = world.client(mode).await;
        assert_eq!(client.size, MIB);
        let write = Ask::new(CMD_WRITE, 0, MIB - 512, 1024).proper(mode);
        assert_eq!(client.ask(write, &[1; 1024]).await.errno, 28);
        assert_eq!(client.ask(Ask::new(CMD_READ, 0, MIB, 512), &[]).await.errno, 22);

        world.disk.show(DISK_BYTES);
        assert_eq!(client.ask(write, &[1; 1024]).await.errno, 0);
        let answer = client.ask(Ask::new(CMD_READ, 0, MIB - 512, 1536), &[]).await;
        assert_eq!(answer.data, [vec![1; 1024], vec![0; 512]].concat());
        for command in [CMD_WRITE_ZEROES, CMD_TRIM] {
            assert_eq!(client.ask(Ask::new(command, 0, 2 * MIB, DISK_BYTES - 2 * MIB), &[]).await.errno, 0);
        }
        if mode != Mode::Simple {
            let answer = client.ask(Ask::new(CMD_BLOCK_STATUS, 0, 0, DISK_BYTES), &[]).await;
            let (_, extents) = &answer.status[0];
            assert_eq!(extents.iter().map(|(len, _)| len).sum::<u64>(), DISK_BYTES);
        }
        assert_eq!(world.client(mode).await.size, DISK_BYTES, "who comes now is told the new size");
    }
}

#[tokio::test]
async fn requests_in_what_was_cut_off_are_refused_and_the_connection_goes_on() {
    for mode in MODES {
        let world = World::start().await;
        let mut client = world.client(mode).await;
        let write = Ask::new(CMD_WRITE, 0, 2 * MIB, 512).proper(mode);
        // The payload of a write is on its way when the disk shrinks.
        client.send(&[&write.encode(mode, 0)[..], &[5; 300]].concat()).await;
        client.send(&[]).await;
        world.disk.show(MIB);
        client.send(&[5; 212]).await;
        let first = client.answer(&[write]).await.errno;
        assert!([0, 28].contains(&first), "{first}");
        assert_eq!(client.ask(write, &[5; 512]).await.errno, 28);
        assert_eq!(client.ask(Ask::new(CMD_READ, 0, MIB - 512, 1024), &[]).await.errno, 22);
        assert_eq!(client.ask(Ask::new(CMD_READ, 0, MIB - 512, 512), &[]).await.errno, 0);
        assert_eq!(world.client(mode).await.size, MIB);
    }
}
